"""Folders as Transformers saves them: the header of the weights, their index, configurations."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

from edge_runtime.exporting import export_package
from tests.exporters.encoder_folder import write_folder
from tests.fuzz.mutation import EDGES, as_json, damage, disturb
from tests.fuzz.surface import Case, Json, Surface, sometimes
from tests.fuzz.surfaces.checkpoint import command_checkpoint, use_checkpoint

FIXTURES = Path(__file__).parents[2] / "fixtures"
_FAMILIES = ("llama", "qwen2", "phi3", "gemma3", "glm", "smollm3", "llama-llama3", "granite")
_TEXT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class SafetensorsFolders(Surface):
    """A case is one file of a folder, named ``family/file``; the others are sound."""

    name = "safetensors"
    weight = 13

    def prepare(self) -> list[Case]:
        self._seeds = []
        for family in _FAMILIES:
            folder = self.folder / family
            shutil.copytree(FIXTURES / "families" / family, folder)
            for name in (*_TEXT, "chat_template.jinja"):
                shutil.copy(FIXTURES / "foreign" / "optimum" / name, folder)
            for file in sorted(folder.iterdir()):
                if file.suffix != ".npz" and (file.name not in _TEXT or family == "llama"):
                    self._seeds.append(Case(f"{family}:{file.name}", file.read_bytes()))
        self._seeds += self._encoder()
        self._weights = [each for each in self._seeds if each.name.endswith(".safetensors")]
        self._sound = {each.name: each.data for each in self._seeds}
        return self._seeds

    def _encoder(self) -> list[Case]:
        folder = self.folder / "encoder"
        write_folder(folder)
        files = sorted(each.relative_to(folder) for each in folder.rglob("*") if each.is_file())
        return [Case(f"encoder:{'|'.join(each.parts)}", (folder / each).read_bytes()) for each in files]

    def make(self, rng: random.Random) -> Case:
        name, data = rng.choice(self._weights if rng.random() < 0.5 else self._seeds)
        if rng.random() < 0.2 or not data.strip():
            return Case(name, damage(rng, data, [each.data for each in self._seeds]))
        if name.endswith(".jinja"):
            return Case(name, damage(rng, data))
        if not name.endswith(".safetensors"):
            value: Any = json.loads(data)
            if rng.random() < 0.15 and name.endswith(":config.json"):  # fields of another family
                value |= json.loads(self._sound[f"{rng.choice(_FAMILIES)}:config.json"])
            return Case(name, as_json(rng, disturb(rng, value, self.made(rng))))
        (length,) = struct.unpack_from("<Q", data)
        header = disturb(rng, json.loads(data[8 : 8 + length]), self.made(rng))
        if rng.random() < 0.7 and isinstance(header, dict):
            _disturb_entry(rng, header)
        made = as_json(rng, header)
        rest = data[8 + length :]
        if rng.random() < 0.1:
            rest = rng.choice((damage(rng, rest), rest[: rng.randrange(len(rest))], rest + b"\0" * 100))
        told = (
            len(made) if rng.random() < 0.8 else rng.choice((*EDGES, 2**64 - 1, len(made) + 1, max(len(made) - 1, 0)))
        )
        return Case(name, struct.pack("<Q", told) + made + rest)

    def run(self, case: Case) -> None:
        family, _, path = case.name.partition(":")
        folder, file = self.folder / family, path.replace("|", "/")
        try:
            (folder / file).write_bytes(case.data)
            if family == "encoder":
                shutil.rmtree(self.folder / "out", ignore_errors=True)
                export_package(str(folder), self.folder / "out", ["onnxruntime"], None)
                return
            if sometimes(case, 64):
                command_checkpoint(folder, self.folder / "out")
            use_checkpoint(folder)
        finally:
            (folder / file).write_bytes(self._sound[case.name])


def _disturb_entry(rng: random.Random, header: Json) -> None:
    """What a tensor is said to be."""
    entries = [each for each in header.values() if isinstance(each, dict) and "data_offsets" in each]
    if not entries:
        return
    entry = rng.choice(entries)
    way = rng.randrange(4)
    if way == 0:
        entry["dtype"] = rng.choice(("F64", "I8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "f32", "", None, "BF16"))
    elif way == 1:
        shape = entry.get("shape")
        numbers = (*EDGES, 2**64 - 1, -1, 1.5, None)
        entry["shape"] = rng.choice(([], [0], [-1, 2], [2**32, 2**32], [rng.choice(numbers)] * 2, [1] * 100, shape))
    elif way == 2:
        entry["data_offsets"] = [rng.choice((*EDGES, -1, 64)), rng.choice((*EDGES, -1, 128))]
    else:
        other = rng.choice(entries)
        entry["data_offsets"] = other.get("data_offsets")
