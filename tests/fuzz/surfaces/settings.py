"""``edge-glm.toml`` and the environment's variables."""

from __future__ import annotations

import os
import random
from unittest.mock import patch

from edge_runtime.settings import load_settings
from tests.fuzz.mutation import damage, disturb
from tests.fuzz.surface import Case, Surface, command, sometimes
from tests.fuzz.toml import as_toml

SEED = {
    "model": "smollm2:135m",
    "device": "auto",
    "fallback": False,
    "weights": "int4",
    "workload": "many",
    "memory_budget": "25%",
    "threads": 2,
    "kv_type": "int8",
    "prefix_store": "1GiB",
    "tuning": True,
    "host": "127.0.0.1",
    "port": 8080,
    "rate_limit": 60,
    "max_body": "8MiB",
    "keep_alive": "5m",
    "also_on": ["openvino:cpu"],
    "cors": ["http://localhost:3000"],
    "temperature": 0.5,
    "seed": 7,
}


class SettingsFiles(Surface):
    name = "settings"
    weight = 7

    def prepare(self) -> list[Case]:
        path = self.folder / "edge-glm.toml"
        return [Case(path.name, as_toml(random.Random(0), SEED)), Case(path.name, b""), Case("environment", b"port=80")]

    def make(self, rng: random.Random) -> Case:
        if rng.random() < 0.1:
            name = rng.choice((*SEED, "nothing"))
            value = rng.choice(("", "-1", "9" * 5000, "nan", "1e999", "true", "[]", "x" * 5000, "\u0661", "0x10", " "))
            return Case("environment", f"{name}={value}".encode())
        data = as_toml(rng, disturb(rng, SEED, self.made(rng)))
        return Case("edge-glm.toml", damage(rng, data) if rng.random() < 0.4 else data)

    def run(self, case: Case) -> None:
        if case.name == "environment":
            name, _, value = case.data.decode(errors="replace").replace("\0", "").partition("=")
            load_settings({}, {f"EDGE_GLM_{name.upper()}": value})
            return
        path = self.folder / case.name
        path.write_bytes(case.data)
        if sometimes(case, 32):
            with patch.dict(os.environ, {"EDGE_GLM_CONFIG": str(path)}):
                command("config", "show")
                command("list")
        settings = load_settings({}, {"EDGE_GLM_CONFIG": str(path)})
        _ = settings.origins, settings.other_devices, settings.format
