"""``edge_glm.json`` of a real package, up to an answer of the model."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from edge_runtime.llm import EdgeLLM
from edge_runtime.package import MANIFEST, Package
from edge_runtime.paths import home
from edge_runtime.planning import Need, plan
from edge_runtime.sampling import SamplingParams
from edge_runtime.store import Store
from tests.fuzz.mutation import EDGES, as_json, damage, disturb
from tests.fuzz.surface import Case, Surface, command, sometimes

_ROOT = Path(__file__).parents[3]
_DEVICES = ("edge:cpu", "onnxruntime:cpu", "edge:cpu", "openvino:cpu")
_COMPRESSION = {
    "recipe": {"method": "gptq", "group": 32, "symmetric": True},
    "calibration": "calibration.txt",
}


class Manifests(Surface):
    name = "manifest"
    weight = 9

    def prepare(self) -> list[Case]:
        self._package = self.folder / "package"
        # in a process of its own: OpenVINO numbers what it names on and on, and cases come from another process
        words = [sys.executable, "-m", "edge_runtime.cli.main", "export", "synthetic:tiny", "-o", str(self._package)]
        subprocess.run(words, cwd=_ROOT, check=True, capture_output=True)
        self._sound = (self._package / MANIFEST).read_bytes()
        (self._package / "beside.txt").write_text("not of the package")
        return [Case(MANIFEST, self._sound)]

    def make(self, rng: random.Random) -> Case:
        if rng.random() < 0.15:
            return Case(MANIFEST, damage(rng, self._sound))
        value = json.loads(self._sound)
        if rng.random() < 0.3:  # numbers of the network, which reach the engine
            network = value["architecture"]
            name = rng.choice([name for name, each in network.items() if isinstance(each, int | list)])
            number = rng.choice((*EDGES, -1, network[name]))
            if isinstance(network[name], list):
                network[name] = rng.choice(([number], [number] * 4, [None, number], [None] * 4, [1, 2, 2, 1]))
            elif isinstance(number, int):
                network[name] = rng.choice((number, number + 1, number * 2))
            if rng.random() < 0.6:
                return Case(MANIFEST, json.dumps(value).encode())
        if rng.random() < 0.1:
            rng.choice(value["variants"])["compression"] = disturb(rng, _COMPRESSION, self.made(rng), most=1)
        return Case(MANIFEST, as_json(rng, disturb(rng, value, self.made(rng), most=2)))

    def run(self, case: Case) -> None:
        path = self._package
        (path / MANIFEST).write_bytes(case.data)
        try:
            if sometimes(case, 32):
                command("show", str(path))
                command("show", "--json", "--verify", str(path))
                command("plan", str(path))
            package = Package.open(path)
            package.verify()
            for variant in package.manifest.variants:
                package.spec(variant)
            _ = package.digest, package.generation, package.chat_template, package.bytes
            plan(Store(home()), str(path), "cpu", None, Need())
            if sometimes(case, 2):
                _answer(path, _DEVICES[sum(case.data) // 2 % len(_DEVICES)])
        finally:
            (path / MANIFEST).write_bytes(self._sound)


def _answer(path: Path, device: str) -> None:
    with EdgeLLM(str(path), device, "2GiB", prefix_store_bytes=0, tuning=False) as llm:
        llm.generate("Hi", SamplingParams(max_tokens=2, seed=1))
