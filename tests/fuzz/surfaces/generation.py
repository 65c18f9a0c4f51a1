"""``generation_config.json``: token ids and defaults of sampling, up to an answer."""

from __future__ import annotations

import json
import random

from edge_runtime.prompts import Text, TierRequest
from edge_runtime.sampling import SamplingParams
from edge_runtime.tiers.local import LocalTier
from edge_runtime.tokenizer import Tokenizer
from tests.fuzz.mutation import as_json, damage, disturb
from tests.fuzz.surface import Case, Surface
from tests.fuzz.surfaces.package import SmallPackage
from tests.server.served import FakeModel

SEED = {
    "bos_token_id": 256,
    "eos_token_id": [257, 256],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_length": 100,
    "max_new_tokens": 8,
    "transformers_version": "5.0.0",
}


class GenerationDefaults(Surface):
    name = "generation"
    weight = 6

    def prepare(self) -> list[Case]:
        self._seeds = [Case("generation_config.json", json.dumps(each).encode()) for each in (SEED, {}, {"top_k": 0})]
        return self._seeds

    def make(self, rng: random.Random) -> Case:
        seed = rng.choice(self._seeds[:1] * 4 + self._seeds)
        if rng.random() < 0.1:
            return Case(seed.name, damage(rng, seed.data))
        return Case(seed.name, as_json(rng, disturb(rng, json.loads(seed.data), self.made(rng))))

    def open(self) -> None:
        self._model = FakeModel()
        self._package = SmallPackage(self.folder / "package", SEED)

    def close(self) -> None:
        self._model.close()

    def run(self, case: Case) -> None:
        package = self._package.with_file(case.name, case.data)
        tokenizer = Tokenizer.from_folder(package.folder)
        fake = self._model
        tier = LocalTier(
            fake.engine, tokenizer, fake.template, max_prompt=400, max_context=512, defaults=package.generation
        )
        with tier.start(TierRequest(Text("Hi"), SamplingParams(max_tokens=3, seed=1))) as generation:
            for chunk in generation:
                chunk.checked()
