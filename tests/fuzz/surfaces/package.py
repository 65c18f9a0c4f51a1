"""A package without a real graph, one file of which is replaced: what reads its texts does not mind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edge_runtime.package import MANIFEST, Package
from edge_runtime.package_writer import PackageContents, write_package
from tests.runtime.test_package import ARCHITECTURE
from tests.server.served import TEMPLATE, byte_tokenizer


class SmallPackage:
    def __init__(self, folder: Path, generation: dict[str, Any]) -> None:
        self.folder = folder
        with write_package(folder) as writer:
            (writer.variant_folder("onnx-int4") / "model.onnx").write_bytes(b"graph")
            writer.add_variant("onnx-int4", "onnxruntime", "int4", "model.onnx")
            tokenizer = byte_tokenizer().json
            tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
            writer.commit(
                PackageContents("x", {}, ARCHITECTURE, tokenizer, TEMPLATE, tokens, False, (257,), generation)
            )
        self._manifest = json.loads((folder / MANIFEST).read_text())

    def with_file(self, name: str, data: bytes) -> Package:
        """The package, opened, whose manifest has the size of the new file."""
        (self.folder / name).write_bytes(data)
        (entry,) = (entry for entry in self._manifest["files"] if entry["path"] == name)
        entry["bytes"] = len(data)
        (self.folder / MANIFEST).write_text(json.dumps(self._manifest))
        return Package.open(self.folder)
