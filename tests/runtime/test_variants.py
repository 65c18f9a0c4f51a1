"""Which variant ``--weights auto`` opens, and when it goes over to another."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from devices.base import DecoderOptions
from devices.discovery import Device
from edge_runtime.budgets import Budget
from edge_runtime.engine import Engine, Successor
from edge_runtime.errors import DeviceUnavailable, EngineError, EngineStopped, ModelNotFound, PromptTooLong
from edge_runtime.exporting import export_package
from edge_runtime.failover import Failover
from edge_runtime.footprint import Model, Use, footprint, least_budget
from edge_runtime.generation import Generation
from edge_runtime.llm import EdgeLLM
from edge_runtime.loading import Loaded
from edge_runtime.memory import BudgetSize
from edge_runtime.package import Package, Variant, Weights
from edge_runtime.placement import Placement
from edge_runtime.prompts import TierRequest, TokenIds
from edge_runtime.sampling import SamplingParams
from edge_runtime.switching import BACK_S, Switching
from edge_runtime.template import ChatTemplate
from edge_runtime.tiers.local import LocalTier
from edge_runtime.variants import Found, Variants, keeps_answers, rank
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import GREEDY, Answer, Gate, collect, greedy, prompt
from tests.runtime.machine import Letters

CPU = Device("onnxruntime:cpu", "onnxruntime", "a processor")
FORMATS: tuple[Weights, ...] = ("int4", "fp32", "int8")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("made") / "tiny"
    for weights in FORMATS:
        made = export_package("synthetic:tiny", folder, ["onnxruntime"], weights)
    return made


def variant(package: Package, weights: Weights) -> Variant:
    found = package.variant("onnxruntime", weights)
    assert found is not None
    return found


# ---- which is the best


@pytest.mark.parametrize(
    ("losses", "order"),
    [
        ({}, ["int8", "fp32", "int4"]),
        ({"int4": 2.0}, ["int8", "fp32", "int4"]),  # beside what?
        ({"fp32": 2.0, "int4": 2.019}, ["int4", "int8", "fp32"]),
        ({"fp32": 2.0, "int4": 2.021}, ["int8", "fp32", "int4"]),
        ({"fp32": 2.0, "int8": 2.5, "int4": 2.1}, ["fp32", "int8", "int4"]),
    ],
)
def test_rank(package: Package, losses: Mapping[Weights, float], order: list[str]) -> None:
    assert [each.weights for each in rank(package.manifest.variants, losses)] == order


def test_what_keeps_the_answers_is_measured_against_the_widest(package: Package) -> None:
    int8 = variant(package, "int8")
    assert keeps_answers(int8, {})
    assert not keeps_answers(int8, {"fp32": 2.0, "int8": 2.1})
    assert keeps_answers(int8, {"int8": 2.1, "int4": 2.2})


def test_memory_decides_between_them(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Variants(lambda model: {"fp32": 2.0, "int8": 2.5, "int4": 2.6}, None)
    models = {each: Model.of(package, variant(package, each)) for each in FORMATS}
    use = Use(1024 * 16, 16, prefix_store=False)
    budgets: list[Budget | None] = [None]
    monkeypatch.setattr("edge_runtime.variants.resolve", lambda size, device: budgets[0])

    def weights(tokens: int | None = None) -> str | None:
        found = chosen.choose(package, CPU, tokens)
        return None if found is None else found.variant.weights

    assert weights() == "fp32"
    budgets[0] = Budget(least_budget(models["fp32"], use))
    assert weights() == "fp32"
    assert weights(1000) == "int8"  # which leaves more for keys and values
    budgets[0] = Budget(least_budget(models["fp32"], use) - 1)
    found = chosen.choose(package, CPU)
    assert found is not None
    assert found.variant.weights == "int8"
    words = r"int8 weights, the most faithful here; not onnx-fp32: within the budget of \S+ MiB it has room for 2\d\d "
    assert re.match(words, found.reason)
    budgets[0] = Budget(footprint(models["int4"], use._replace(tokens=1000)).budget)
    assert weights(1000) == "int4"
    assert weights(5000) == "int4"  # no sequence has more than the model's context
    budgets[0] = Budget(1 << 20)
    assert weights() is None
    assert chosen.refine(Placement(CPU, package, variant(package, "int8"), "so")).variant.weights == "int8"


# ---- going over to another


class Two(Variants):
    """fp32 weights leave room for 64 tokens, int4 for 256."""

    def __init__(self) -> None:
        super().__init__(lambda model: {}, BudgetSize(1 << 30))

    def choose(
        self,
        package: Package,
        device: Device,
        tokens: int | None = None,
        among: Sequence[Variant] | None = None,
        within: int | None = None,
    ) -> Found | None:
        if within is not None and within < 100:
            tokens = 200
        sizes: tuple[tuple[Weights, int], ...] = (("fp32", 64), ("int4", 256))
        for weights, room in sizes:
            found = variant(package, weights)
            if room >= (tokens or 1) and (among is None or found in among):
                return Found(found, f"{weights} has room")
        return None


class Box:
    """A device for :class:`Two`, over fake decoders."""

    def __init__(self, package: Package, auto: bool = True) -> None:
        self.now = 0.0
        self.refused: set[Weights] = set()
        self.opened: list[Weights] = []
        self.decoders: dict[Weights, FakeDecoder] = {}
        self.failover = Failover(self.place, self.load, Placement(CPU, package, variant(package, "fp32"), "so"))
        self.switching = Switching(self.failover, Two(), auto, lambda: self.now)

    def place(self, aside: Mapping[str, str]) -> Placement:
        raise DeviceUnavailable("there is one device")

    def load(self, placement: Placement, successor: Successor, sharing: int) -> Loaded:
        weights = placement.variant.weights
        if weights in self.refused:
            raise EngineError("out of memory")
        self.opened.append(weights)
        limit = 64 if weights == "fp32" else 256
        decoder = self.decoders[weights] = FakeDecoder(max_context=limit)
        engine = Engine(decoder, Letters(), vocab_size=64, successor=successor)
        tier = LocalTier(
            engine,
            Letters(),  # type: ignore[arg-type]
            ChatTemplate(None, {}),
            max_prompt=limit,
            max_context=limit,
        )
        return Loaded(placement, CPU.name, engine, tier, limit, limit, DecoderOptions())

    def start(self, length: int) -> Generation:
        return self.switching.start(TierRequest(TokenIds(prompt(1, length)), GREEDY))

    def answer(self, length: int) -> None:
        answer = collect(self.start(length))[0]
        assert answer.tokens == greedy(self.decoders[self.weights], prompt(1, length), 12)

    @property
    def weights(self) -> Weights:
        return self.failover.loaded[0].placement.variant.weights


@pytest.fixture
def box(package: Package) -> Iterator[Box]:
    made = Box(package)
    yield made
    made.failover.close()


def test_a_long_prompt_goes_to_a_variant_with_room_for_it(box: Box) -> None:
    box.answer(20)
    box.answer(100)
    assert box.weights == "int4"
    assert box.failover.loaded[0].reason == "so; int4 weights, for a prompt that needs room for 112 tokens"
    assert box.opened == ["fp32", "int4"]
    box.answer(100)
    assert box.opened == ["fp32", "int4"]


def test_where_memory_has_become_short_an_idle_model_goes_over(box: Box) -> None:
    gate = Gate()
    box.decoders["fp32"].before_forward = gate
    begun = box.start(20)
    assert gate.reached.wait(60)
    assert not box.switching.relieve(99)  # it runs
    gate.open.set()
    collect(begun)
    while not box.failover.loaded[0].engine.idle:
        pass
    assert box.switching.relieve(100)
    assert box.weights == "fp32"  # which has room enough
    assert box.switching.relieve(99)
    assert box.weights == "int4"
    box.answer(20)
    while not box.failover.loaded[0].engine.idle:
        pass
    assert box.switching.relieve(None)
    assert box.weights == "fp32"
    box.answer(20)


def test_weights_that_were_chosen_stay_however_short_memory_is(package: Package) -> None:
    box = Box(package, auto=False)
    assert box.switching.relieve(99)
    assert box.opened == ["fp32"]
    box.failover.close()


def test_what_runs_ends_on_the_variant_it_was_begun_with(box: Box) -> None:
    gate = Gate()
    fp32 = box.decoders["fp32"]
    fp32.before_forward = gate
    begun = box.start(20)
    assert gate.reached.wait(60)
    answers: list[Answer] = []
    asking = threading.Thread(target=lambda: answers.append(collect(box.start(100))[0]))
    asking.start()
    while box.failover.loaded[0].engine._estate.wanted is None:
        pass
    gate.open.set()
    asking.join(60)
    assert collect(begun)[0].tokens == greedy(fp32, prompt(1, 20), 12)
    assert answers[0].tokens == greedy(box.decoders["int4"], prompt(1, 100), 12)


def test_back_to_the_better_one_when_nothing_long_has_come_for_a_while(box: Box) -> None:
    box.answer(100)
    box.now += BACK_S - 1
    box.answer(20)
    assert box.weights == "int4"
    box.answer(100)  # the while begins anew
    box.now += BACK_S - 1
    box.answer(20)
    assert box.weights == "int4"
    box.now += 2
    box.answer(20)
    assert box.weights == "fp32"
    assert box.opened == ["fp32", "int4", "fp32"]


def test_it_does_not_go_back_while_something_runs(box: Box) -> None:
    box.answer(100)
    gate = Gate()
    box.decoders["int4"].before_forward = gate
    running = box.start(20)
    assert gate.reached.wait(60)
    box.now += BACK_S
    second = box.start(20)
    assert box.weights == "int4"
    gate.open.set()
    for each in (running, second):
        assert collect(each)[0].finish_reason == "length"


def test_too_long_for_all(box: Box) -> None:
    with pytest.raises(PromptTooLong, match="64"):
        box.start(250)
    assert box.opened == ["fp32"]


def test_a_variant_that_does_not_open(box: Box) -> None:
    """What was open is open again, and the prompt is refused."""
    box.refused.add("int4")
    with pytest.raises(PromptTooLong):
        box.start(100)
    box.answer(20)
    assert box.opened == ["fp32", "fp32"]


def test_asked_for_by_name(box: Box) -> None:
    box.switching.switch("int4")
    box.now += 2 * BACK_S
    box.answer(20)
    assert box.weights == "int4"
    box.switching.switch("auto")
    assert box.weights == "fp32"
    box.refused.add("int4")
    with pytest.raises(EngineError, match="out of memory"):
        box.switching.switch("int4")
    box.answer(20)
    with pytest.raises(ModelNotFound, match=r"no fp16 variant for onnxruntime:cpu; it has: .*onnx-int8"):
        box.switching.switch("fp16")


def test_weights_that_were_asked_for_stay(package: Package) -> None:
    box = Box(package, auto=False)
    with pytest.raises(PromptTooLong, match="64"):
        box.start(100)
    box.failover.close()
    with pytest.raises(EngineStopped):
        box.switching.switch("int4")


# ---- with a real device


def test_a_real_model_switches(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    ref, ids = str(package.folder), [3, 1, 4, 1, 5]
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    expected = {}
    for weights in ("fp32", "int4"):
        with EdgeLLM(ref, "onnxruntime:cpu", weights=weights, prefix_store_bytes=0) as llm:
            expected[weights] = llm.generate(ids, params).token_ids
    assert expected["fp32"] != expected["int4"]
    with EdgeLLM(ref, "onnxruntime:cpu", weights="auto", prefix_store_bytes=0) as llm:
        assert llm.placement["variant"] == "onnx-int8"
        assert llm.reason == "it was asked for; int8 weights, which keep the answers"
        llm.switch("fp32")
        assert llm.reason == "it was asked for; fp32 weights, which were asked for"
        stream = llm.stream(ids, params)
        first = next(stream)
        llm.switch("int4")
        rest = [token for chunk in stream for token in chunk.token_ids]
        assert (*first.token_ids, *rest) == expected["fp32"]
        assert llm.generate(ids, params).token_ids == expected["int4"]
        assert llm.placement["variant"] == "onnx-int4"
