"""Folders by optimum-intel and by onnxruntime-genai: their configurations and graphs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from edge_runtime.exporting import export_package
from edge_runtime.llm import EdgeLLM
from edge_runtime.sampling import SamplingParams
from tests.fuzz.mutation import as_json, damage, disturb
from tests.fuzz.surface import Case, Surface, command, sometimes

FOREIGN = Path(__file__).parents[2] / "fixtures" / "foreign"
_WEIGHTS = ("openvino_model.bin", "model.onnx.data")


class ForeignFolders(Surface):
    """A case is one file of a folder, named ``folder:file``; the others are sound."""

    name = "foreign"
    weight = 5

    def prepare(self) -> list[Case]:
        self._seeds = []
        for name in ("optimum", "genai"):
            shutil.copytree(FOREIGN / name, self.folder / name)
            for file in sorted((self.folder / name).iterdir()):
                if file.name != "expected.json" and file.name not in _WEIGHTS:
                    self._seeds.append(Case(f"{name}:{file.name}", file.read_bytes()))
        self._sound = {each.name: each.data for each in self._seeds}
        return self._seeds

    def make(self, rng: random.Random) -> Case:
        configurations = [each for each in self._seeds if "config.json" in each.name]
        name, data = rng.choice(configurations if rng.random() < 0.5 else self._seeds)
        if not name.endswith(".json") or rng.random() < 0.15:
            return Case(name, damage(rng, data, [each.data for each in self._seeds]))
        value: Any = json.loads(data)
        return Case(name, as_json(rng, disturb(rng, value, self.made(rng))))

    def run(self, case: Case) -> None:
        name, _, file = case.name.partition(":")
        folder, out = self.folder / name, self.folder / "out"
        engine, device = ("openvino", "openvino:cpu") if name == "optimum" else ("onnxruntime", "onnxruntime:cpu")
        try:
            (folder / file).write_bytes(case.data)
            if sometimes(case, 64):
                command("plan", str(folder))
            package = export_package(str(folder), out, [engine], None)
            if sometimes(case, 12):
                with EdgeLLM(str(package.folder), device, "2GiB", prefix_store_bytes=0, tuning=False) as llm:
                    llm.generate("abc", SamplingParams(max_tokens=2, seed=1))
        finally:
            shutil.rmtree(out, ignore_errors=True)
            (folder / file).write_bytes(self._sound[case.name])
