"""A policy over a small local model and whatever upstreams a test needs."""

from __future__ import annotations

import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from devices.base import Step
from edge_runtime.egress.ledger import Ledger
from edge_runtime.errors import EdgeError
from edge_runtime.generation import Generation
from edge_runtime.paths import Home
from edge_runtime.policy.rules import LocalTierSpec
from edge_runtime.prompts import NOTHING, About, Fit, Messages, Text, TierRequest, TokenIds
from edge_runtime.request import Chunk
from edge_runtime.route import Route
from edge_runtime.routing.dispatcher import Dispatcher
from edge_runtime.sampling import SamplingParams
from edge_runtime.tiers.model import LocalModel, continued
from edge_runtime.timing.model import ALONE, TimingModel
from edge_runtime.timing.ttft import PredictedTTFT, predict_ttft
from tests.server.served import FakeModel

QUESTION: Sequence[Mapping[str, Any]] = [{"role": "user", "content": "what is it?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


class FakeLocal(LocalModel):
    """A tier over the fake decoder. ``gate``: set, it answers; ``error``: what it fails with."""

    def __init__(self, max_prompt: int = 400) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: EdgeError | None = None
        self.knows_tools = False
        self.started: list[Generation] = []
        self.max_prompt = max_prompt
        self.timing: TimingModel | None = None
        self.fake = FakeModel(before_forward=self._wait)

    def _wait(self, batch: Sequence[Step]) -> None:
        assert self.gate.wait(60)

    @property
    def names(self) -> tuple[str, ...]:
        return ("fake",)

    def prepare(self, request: TierRequest) -> TierRequest:
        return self.fake.tier.prepare(request)

    def unsupported(self, request: TierRequest) -> str | None:
        if request.about.tools and not self.knows_tools:
            return "tools is not supported by models here: leave it out"
        return self.fake.tier.unsupported(request)

    def fit(self, prepared: TierRequest) -> Fit:
        assert isinstance(prepared.prompt, TokenIds)
        return Fit(len(prepared.prompt.ids), self.max_prompt, 512)

    def predicted_ttft(self, prepared: TierRequest) -> PredictedTTFT | None:
        return None if self.timing is None else predict_ttft(self.timing, len(prepared.ids), 0, ALONE)

    def start(self, prepared: TierRequest) -> Generation:
        if self.error is not None:
            raise self.error
        assert isinstance(prepared.prompt, TokenIds)
        generation = self.fake.tier.start(prepared)
        self.started.append(generation)
        return generation

    def go_on(self, prepared: TierRequest, text: str) -> TierRequest:
        return continued(prepared, text, self.fake.tokenizer.encode(text))

    def text(self, params: SamplingParams = GREEDY, messages: Sequence[Mapping[str, Any]] = QUESTION) -> str:
        """What it answers."""
        return self.fake.answer(messages, params)[0]

    def close(self) -> None:
        self.gate.set()
        self.fake.engine.close()


class House:
    """A dispatcher, its policy file and its ledger."""

    def __init__(self, folder: Path, policy: str, local: FakeLocal, offline: bool = False) -> None:
        self.folder = folder
        self.path = folder / "policy.toml"
        self.local = local
        self.beside: list[FakeLocal] = []
        self.write(policy)
        self.dispatcher = Dispatcher(self.path, local, self._open_beside, Home(folder, folder), offline)

    def write(self, policy: str) -> None:
        self.path.write_text(policy, encoding="utf-8")

    def _open_beside(self, tier: LocalTierSpec) -> Beside:
        return Beside(self)

    def start(
        self,
        messages: Sequence[Mapping[str, Any]] = QUESTION,
        params: SamplingParams = GREEDY,
        about: About = NOTHING,
    ) -> Generation:
        return self.dispatcher.start(TierRequest(Messages(messages), params, about))

    def ask(self, *given: Any, **named: Any) -> Answered:
        """The whole answer; raises what it fails with."""
        with self.start(*given, **named) as generation:
            chunks = [chunk.checked() for chunk in generation]
            return Answered(chunks, generation)

    @property
    def ledger(self) -> list[dict[str, Any]]:
        ledger = Ledger(self.folder / "ledger.sqlite")
        try:
            assert ledger.verify() == []
            return list(ledger.rows())
        finally:
            ledger.close()


class Beside:
    """Another model."""

    def __init__(self, house: House) -> None:
        self.local = FakeLocal()
        house.beside.append(self.local)

    def close(self) -> None:
        self.local.close()


class Answered:
    def __init__(self, chunks: list[Chunk], generation: Generation) -> None:
        self.chunks = chunks
        self.route: Route = generation.route
        self.usage = generation.usage

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def tiers(self) -> list[str]:
        """Who made it, in the order in which it came."""
        return list(dict.fromkeys(chunk.tier for chunk in self.chunks))


@contextmanager
def house(folder: Path, policy: str, *, offline: bool = False, max_prompt: int = 400) -> Iterator[House]:
    local = FakeLocal(max_prompt)
    made = None
    try:
        made = House(folder, policy, local, offline)
        yield made
    finally:
        if made is not None:
            made.dispatcher.close()
        local.close()


def cloud(url: str, **options: Any) -> str:
    """A remote tier's lines of a policy."""
    given = {"context": 1000, "max_output": 100, "retry": {"attempts": 1}, **options}
    lines = [f'[[tiers]]\nname = "cloud"\nkind = "openai"\nbase_url = "{url}"\nmodel = "big"']
    lines += [f"{name} = {_toml(value)}" for name, value in given.items()]
    return "\n".join(lines) + "\n"


LOCAL = '[[tiers]]\nname = "local"\nkind = "local"\n'


def task(**options: Any) -> str:
    """A class that takes every request and may send it anywhere."""
    given = {"name": "all", "privacy": "any", **options}
    return "[[classes]]\n" + "".join(f"{name} = {_toml(value)}\n" for name, value in given.items())


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f'"{name}" = {_toml(each)}' for name, each in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        assert tomllib.loads(f"x = {text}")["x"] == value
        return text
    return repr(value)


class TieredModel(FakeModel):
    """A house as the server sees a model."""

    def __init__(self, house: House) -> None:
        self._house = house
        fake = house.local.fake
        self.model_id, self.created, self.placement = fake.model_id, fake.created, fake.placement
        self.tokenizer, self.engine, self.eos_ids = fake.tokenizer, fake.engine, fake.eos_ids

    @property
    def tiers(self) -> Dispatcher:
        return self._house.dispatcher

    def start_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, about: About = NOTHING
    ) -> Generation:
        return self._house.start(messages, params, about)

    def start_completion(
        self, prompt: str | Sequence[int], params: SamplingParams, about: About = NOTHING
    ) -> Generation:
        asked = Text(prompt) if isinstance(prompt, str) else TokenIds(prompt)
        return self._house.dispatcher.start(TierRequest(asked, params, about))
