"""From an encoder's folder to a package."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from edge_runtime.errors import ConfigError, UnsupportedModel
from edge_runtime.package import ArchitectureSummary, EncoderSummary, Weights
from edge_runtime.package_writer import PackageContents, write_package
from exporters.encoder.checkpoint import EncoderArchitecture, EncoderCheckpoint
from exporters.encoder.graph import write_encoder

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""Export's name of an engine → the runtime's."""


def export_encoder(
    checkpoint: EncoderCheckpoint,
    folder: Path,
    engines: Sequence[str],
    weights: Weights,
    *,
    name: str,
    provenance: Mapping[str, Any],
) -> None:
    """Write a package in ``folder``, or add the variants that are missing. UnsupportedModel, ConfigError, StorageError,
    CorruptModel."""
    if weights not in ("fp32", "fp16"):
        raise UnsupportedModel(f"encoders have fp32 or fp16 weights here, not {weights}; choose --weights fp32")
    other = [engine for engine in engines if engine not in ENGINES]
    if other:
        raise UnsupportedModel(f"encoders run on {' and '.join(ENGINES)}, not on {', '.join(other)}")
    made_from = {**checkpoint.provenance, **provenance}
    with write_package(folder) as writer:
        if writer.existing is not None and writer.existing.provenance.get("sha256") != made_from.get("sha256"):
            raise ConfigError(f"{folder} is a package of another model; choose another folder or remove it")
        for engine in engines:
            variant = f"{engine}-{weights}"
            if writer.has_variant(variant):
                continue
            scratch = writer.folder / "scratch"
            scratch.mkdir()
            try:
                file = write_encoder(checkpoint, writer.variant_folder(variant), scratch, weights)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            writer.add_variant(variant, cast(Any, ENGINES[engine]), weights, file)
        writer.commit(_contents(checkpoint, name, made_from))


def _contents(checkpoint: EncoderCheckpoint, name: str, provenance: dict[str, Any]) -> PackageContents:
    arch = checkpoint.architecture
    return PackageContents(
        name=name,
        provenance=provenance,
        architecture=_summary(arch),
        tokenizer_json=checkpoint.tokenizer_json,
        chat_template=None,
        special_tokens=checkpoint.special_tokens,
        add_bos=False,
        eos_ids=(),
        generation={},
        encoder=EncoderSummary(arch.pooling, arch.normalize, arch.first_position),
    )


def _summary(arch: EncoderArchitecture) -> ArchitectureSummary:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    layer = 4 * hidden * (hidden + 1) + inner * (hidden + 1) + hidden * (inner + 1) + 4 * hidden
    return ArchitectureSummary(
        family=arch.family,
        parameters=(arch.vocab_size + arch.positions + 3) * hidden + arch.num_layers * layer,
        num_layers=arch.num_layers,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_heads,
        head_dim=arch.head_dim,
        hidden_size=hidden,
        vocab_size=arch.vocab_size,
        max_context=arch.max_tokens,
    )
