"""A device that fails is put aside, the next takes over, and nobody is left without an answer or an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec, Step
from devices.discovery import Device
from devices.errors import DeviceUnavailable, EngineError
from devices.onnxruntime_gqa import OnnxRuntimeDecoder
from edge_runtime.engine import Engine, Successor
from edge_runtime.errors import EdgeError, EngineStopped, PromptTooLong
from edge_runtime.failover import Failover
from edge_runtime.generation import Generation
from edge_runtime.llm import EdgeLLM
from edge_runtime.loading import Loaded
from edge_runtime.package import Package, Variant
from edge_runtime.paths import Home
from edge_runtime.placement import Placement, Wish, place
from edge_runtime.sampling import SamplingParams
from edge_runtime.store import Store, export_package
from edge_runtime.template import ChatTemplate
from edge_runtime.tiers.base import TierRequest, TokenIds
from edge_runtime.tiers.local import LocalTier
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import GREEDY, Gate, LetterTokenizer, collect, greedy, prompt

LONG = SamplingParams(temperature=0, max_tokens=40)


class Failing:
    """Fails one forward after so many, as a device that is pulled out."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, batch: Sequence[Step]) -> None:
        self.left -= 1
        if self.left < 0:
            raise EngineError("the accelerator fell over")


class Letters(LetterTokenizer):
    eos_ids: Sequence[int] = ()


class Machine:
    """Devices ``fake:0``, ``fake:1``, … in this order, over fake decoders or what opening them raises."""

    def __init__(self, *decoders: FakeDecoder | EdgeError, compiling: threading.Event | None = None) -> None:
        """``compiling``: the first compiles the model until that is set."""
        self.compiling = compiling
        self.decoders = {f"fake:{number}": decoder for number, decoder in enumerate(decoders)}
        self.opened: list[str] = []
        self.shares: dict[str, int] = {}

    def place(self, aside: Mapping[str, str]) -> Placement:
        for name in self.decoders:
            if name not in aside:
                passed_over = "; not ".join(f"{device}: {why}" for device, why in aside.items())
                compiles = self.compiling is not None and name == "fake:0"
                device = Device(name, "openvino", name, compiles=compiles)
                return Placement(device, NO_PACKAGE, NO_VARIANT, f"not {passed_over}")
        raise DeviceUnavailable("there is no other device")

    def load(self, placement: Placement, successor: Successor, sharing: int) -> Loaded:
        name = placement.device.name
        decoder = self.decoders[name]
        if placement.device.compiles and self.compiling is not None:
            assert self.compiling.wait(60)
        if isinstance(decoder, EdgeError):
            raise decoder
        self.shares[name] = sharing
        self.opened.append(name)
        tokens = Letters()
        engine = Engine(decoder, tokens, vocab_size=decoder.vocab_size, successor=successor)
        limits = decoder.limits
        tier = LocalTier(
            engine,
            tokens,  # type: ignore[arg-type]
            ChatTemplate(None, {}),
            max_prompt=limits.max_prompt,
            max_context=limits.max_context,
        )
        return Loaded(placement, name, engine, tier, limits.max_prompt, limits.max_context)

    def start(self) -> Failover:
        return Failover(self.place, self.load, self.place({}))


NO_PACKAGE: Package = None  # type: ignore[assignment]
NO_VARIANT: Variant = None  # type: ignore[assignment]


def submit(failover: Failover, tokens: Sequence[int], params: SamplingParams = GREEDY) -> Generation:
    return failover.start(TierRequest(TokenIds(tokens), params))


def test_what_had_sent_nothing_is_answered_by_the_next_device() -> None:
    gate = Gate()
    second = FakeDecoder()

    def fail(batch: Sequence[Step]) -> None:
        gate(batch)
        raise EngineError("the accelerator fell over")

    first = FakeDecoder(before_forward=fail, max_sequences=2)
    failover = Machine(first, second).start()
    prompts = [prompt(seed, 20 + seed) for seed in range(5)]  # of which two run and three wait
    generations = [submit(failover, each, SamplingParams(temperature=0, max_tokens=12, n=2)) for each in prompts]
    gate.open.set()
    for tokens, generation in zip(prompts, generations, strict=True):
        answers = collect(generation, 2)
        assert [answer.tokens for answer in answers] == [greedy(second, tokens, 12)] * 2
        assert generation.usage.prompt_tokens == len(tokens)
        assert generation.usage.completion_tokens == 24
    assert first.closed
    assert not second.closed
    assert failover.loaded[0].device == "fake:1"
    assert failover.loaded[0].placement.reason == "not fake:0: it failed (the accelerator fell over)"
    failover.close()
    assert second.closed
    assert not second.sequences


def test_what_was_begun_ends_with_the_error() -> None:
    machine = Machine(FakeDecoder(max_context=4096, kv_tokens=8192), FakeDecoder())
    failover = machine.start()
    decoder = machine.decoders["fake:0"]
    assert isinstance(decoder, FakeDecoder)
    begun = submit(failover, prompt(1, 5), SamplingParams(temperature=0, max_tokens=4000))
    first = next(iter(begun))
    assert first.text
    decoder.before_forward = Failing(0)
    answer = collect(begun)[0]
    assert answer.finish_reason == "error"
    assert answer.last is not None
    assert "fell over" in str(answer.last.error)
    later = collect(submit(failover, prompt(2, 5)))[0]
    assert later.finish_reason == "length"
    assert failover.loaded[0].device == "fake:1"
    failover.close()


def test_readings_are_made_by_the_next_device() -> None:
    second = FakeDecoder()
    failover = Machine(FakeDecoder(before_forward=Failing(1)), second).start()
    tokens = prompt(3, 60)
    scores = failover.score(tokens)
    with Engine(FakeDecoder(), LetterTokenizer(), vocab_size=64) as plain:
        np.testing.assert_array_equal(scores, plain.score(tokens))
    assert failover.loaded[0].device == "fake:1"
    failover.close()


def test_what_the_next_device_cannot_take_is_refused_by_both_numbers() -> None:
    failover = Machine(FakeDecoder(before_forward=Failing(0)), FakeDecoder(max_context=32)).start()
    answer = collect(submit(failover, prompt(1, 40)))[0]
    assert answer.last is not None
    assert isinstance(answer.last.error, PromptTooLong)
    assert "40 tokens, this model and device take 32" in str(answer.last.error)
    failover.close()


def test_devices_that_fail_one_after_the_other() -> None:
    machine = Machine(FakeDecoder(before_forward=Failing(3)), FakeDecoder(before_forward=Failing(0)), FakeDecoder())
    failover = machine.start()
    waiting = [submit(failover, prompt(seed, 50)) for seed in range(3)]
    assert [collect(each)[0].finish_reason for each in waiting].count("length") >= 2
    assert machine.opened == ["fake:0", "fake:1", "fake:2"]
    assert list(failover.aside) == ["fake:0", "fake:1"]
    failover.close()


def test_without_another_device_it_goes_on_as_well_as_it_can() -> None:
    decoder = FakeDecoder(before_forward=Failing(0))
    failover = Machine(decoder).start()
    answer = collect(submit(failover, prompt(1, 5)))[0]
    assert answer.finish_reason == "error"
    decoder.before_forward = lambda batch: None
    assert collect(submit(failover, prompt(1, 5)))[0].tokens == greedy(decoder, prompt(1, 5), 12)
    assert not failover.aside
    failover.close()


def test_when_no_other_device_opens_everybody_is_told() -> None:
    failover = Machine(FakeDecoder(before_forward=Failing(0)), EngineError("no driver")).start()
    answer = collect(submit(failover, prompt(1, 5)))[0]
    assert answer.last is not None
    assert isinstance(answer.last.error, EngineStopped)
    for part in ("fake:cpu failed (the accelerator fell over)", "nothing takes its place", "no driver"):
        assert part in str(answer.last.error)
    with pytest.raises(EngineStopped, match="no driver"):
        submit(failover, prompt(1, 5))
    assert not failover.loaded[0].engine.alive
    failover.close()


def test_a_device_that_does_not_open_is_passed_over() -> None:
    failover = Machine(EngineError("no driver"), FakeDecoder()).start()
    assert failover.loaded[0].device == "fake:1"
    assert failover.aside == {"fake:0": "it does not open (no driver)"}
    failover.close()


@pytest.mark.parametrize(
    ("errors", "kind", "words"),
    [
        ([EngineError("no driver")], EngineError, "^no driver$"),
        (
            [EngineError("no driver"), DeviceUnavailable("gone")],
            DeviceUnavailable,
            r"fake:0: it does not open \(no driver\); fake:1: it does not open \(gone\)",
        ),
    ],
)
def test_when_nothing_opens(errors: list[EdgeError], kind: type[EdgeError], words: str) -> None:
    with pytest.raises(kind, match=words):
        Machine(*errors).start()


def test_long_stories_of_engines_are_cut_in_reasons() -> None:
    failover = Machine(EngineError("no driver " * 100), FakeDecoder()).start()
    assert len(failover.aside["fake:0"]) < 230
    failover.close()


def test_closing_while_another_device_takes_over() -> None:
    second = FakeDecoder()
    machine = Machine(FakeDecoder(before_forward=Failing(0)), second)
    opening, go_on = threading.Event(), threading.Event()
    plain = machine.load

    def load(placement: Placement, successor: Successor, sharing: int) -> Loaded:
        if placement.device.name == "fake:1":
            opening.set()
            assert go_on.wait(60)
        return plain(placement, successor, sharing)

    failover = Failover(machine.place, load, machine.place({}))
    generation = submit(failover, prompt(1, 5))
    assert opening.wait(60)
    closing = threading.Thread(target=failover.close)
    closing.start()
    go_on.set()
    assert collect(generation)[0].finish_reason in ("error", "length")
    closing.join(60)
    assert not closing.is_alive()
    failover.close()
    assert second.closed


def test_cancelled_while_another_device_takes_over() -> None:
    gate = Gate()

    def fail(batch: Sequence[Step]) -> None:
        gate(batch)
        raise EngineError("the accelerator fell over")

    failover = Machine(FakeDecoder(before_forward=fail), FakeDecoder()).start()
    generation = submit(failover, prompt(1, 5))
    assert gate.reached.wait(60)
    generation.cancel()
    gate.open.set()
    assert collect(generation)[0].finish_reason == "cancelled"
    failover.close()


# ---- while one compiles


def ready(failover: Failover) -> None:
    """Wait until both are in use."""
    end = time.monotonic() + 60
    while len(failover.loaded) < 2:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_another_device_answers_while_one_compiles() -> None:
    compiling = threading.Event()
    npu, cpu = FakeDecoder(max_prompt=32), FakeDecoder()
    machine = Machine(npu, cpu, compiling=compiling)
    failover = machine.start()
    assert [each.device for each in failover.loaded] == ["fake:1"]
    assert failover.loaded[0].placement.reason == "not fake:0: it is compiling the model"
    assert collect(submit(failover, prompt(1, 20)))[0].tokens == greedy(cpu, prompt(1, 20), 12)
    assert not npu.batches
    gate = Gate()
    cpu.before_forward = gate
    begun = submit(failover, prompt(2, 20))
    assert gate.reached.wait(60)
    compiling.set()
    ready(failover)
    assert failover.aside == {}
    before = len(cpu.batches)
    assert collect(submit(failover, prompt(3, 20)))[0].tokens == greedy(npu, prompt(3, 20), 12)
    assert len(cpu.batches) == before
    gate.open.set()
    assert collect(begun)[0].finish_reason == "length"  # where it began
    assert machine.shares == {"fake:0": 2, "fake:1": 2}
    failover.close()
    assert npu.closed
    assert cpu.closed


def test_what_is_too_long_for_one_goes_to_the_next() -> None:
    npu, cpu = FakeDecoder(max_prompt=32), FakeDecoder()
    compiling = threading.Event()
    compiling.set()
    failover = Machine(npu, cpu, compiling=compiling).start()
    ready(failover)
    collect(submit(failover, prompt(1, 32)))
    assert npu.batches
    assert not cpu.batches
    assert collect(submit(failover, prompt(1, 33)))[0].tokens == greedy(cpu, prompt(1, 33), 12)
    assert len(failover.score(prompt(1, 200))) == 199
    with pytest.raises(PromptTooLong, match="300 tokens, this model and device take 256"):
        submit(failover, prompt(1, 300))
    failover.close()


def test_a_device_that_does_not_compile_is_put_aside() -> None:
    compiling = threading.Event()
    failover = Machine(EngineError("the compiler crashed"), FakeDecoder(), compiling=compiling).start()
    compiling.set()
    end = time.monotonic() + 60
    while "crashed" not in failover.aside.get("fake:0", ""):
        assert time.monotonic() < end
        time.sleep(0.001)
    assert collect(submit(failover, prompt(1, 20)))[0].finish_reason == "length"
    assert [each.device for each in failover.loaded] == ["fake:1"]
    failover.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_of_two_in_use_one_fails(failing: int) -> None:
    compiling = threading.Event()
    compiling.set()
    decoders = [FakeDecoder(max_prompt=32), FakeDecoder()]
    machine = Machine(*decoders, compiling=compiling)
    failover = machine.start()
    ready(failover)
    decoders[failing].before_forward = Failing(0)
    other = decoders[1 - failing]
    answer = collect(submit(failover, prompt(1, 20)))[0]
    assert answer.tokens == greedy(other, prompt(1, 20), 12)
    if failing == 1:
        last = collect(submit(failover, prompt(1, 40)))[0].last
        assert last is not None
        assert "40 tokens, this model and device take 32" in str(last.error)
    assert [each.device for each in failover.loaded] == [f"fake:{1 - failing}"]
    assert sorted(machine.opened) == ["fake:0", "fake:1"]
    failover.close()


def test_without_another_device_one_waits_for_the_compiler() -> None:
    compiling = threading.Event()
    compiling.set()
    failover = Machine(FakeDecoder(), compiling=compiling).start()
    assert [each.device for each in failover.loaded] == ["fake:0"]
    assert not failover.aside
    failover.close()


def test_closing_while_one_compiles() -> None:
    compiling = threading.Event()
    npu, cpu = FakeDecoder(), FakeDecoder()
    failover = Machine(npu, cpu, compiling=compiling).start()
    closing = threading.Thread(target=failover.close)
    closing.start()
    while not cpu.closed:
        time.sleep(0.001)
    compiling.set()
    closing.join(60)
    assert not closing.is_alive()
    assert npu.closed


# ---- with real devices


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    return export_package("synthetic:tiny", tmp_path / "tiny", ["onnxruntime", "openvino"], "int4").folder


def failing_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first, by which the engine learns the size of the vocabulary."""
    plain, failing = OnnxRuntimeDecoder.forward, Failing(1)

    def forward(self: OnnxRuntimeDecoder, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        failing(batch)
        return plain(self, batch)

    monkeypatch.setattr(OnnxRuntimeDecoder, "forward", forward)


def test_a_real_device_that_fails_while_running(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_forward(monkeypatch)
    with EdgeLLM(str(tiny), "cpu", prefix_store_bytes=0) as llm:
        assert llm.device == "onnxruntime:cpu"
        answer = llm.generate([1, 2, 3, 4], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        assert len(answer.token_ids) == 8
        assert llm.placement["device"] == "openvino:cpu"
        assert llm.placement["variant"] == "openvino-int4"
        assert "onnxruntime:cpu: it failed (the accelerator fell over)" in llm.reason
        assert llm.ready


def test_a_named_device_fails_without_fallback(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_forward(monkeypatch)
    with EdgeLLM(str(tiny), "onnxruntime:cpu", prefix_store_bytes=0) as llm:
        with pytest.raises(EngineError, match="fell over"):
            llm.generate([1, 2, 3, 4], GREEDY)
        assert llm.device == "onnxruntime:cpu"
    with EdgeLLM(str(tiny), "onnxruntime:cpu", prefix_store_bytes=0, fallback=True) as llm:
        assert llm.generate([1, 2, 3, 4], GREEDY).token_ids
        assert llm.device == "openvino:cpu"


def test_a_real_device_that_does_not_open(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: OnnxRuntimeDecoder, spec: DecoderSpec, options: DecoderOptions, device: str) -> None:
        raise EngineError("loading failed in ONNX Runtime: out of address space")

    monkeypatch.setattr(OnnxRuntimeDecoder, "__init__", refuse)
    with pytest.raises(EngineError, match="address space"):
        EdgeLLM(str(tiny), "onnxruntime:cpu")
    for device, fallback in (("auto", False), ("onnxruntime:cpu", True)):
        with EdgeLLM(str(tiny), device, prefix_store_bytes=0, fallback=fallback) as llm:
            assert llm.device == "openvino:cpu"
            assert "onnxruntime:cpu: it does not open (loading failed" in llm.reason


def test_fallback_from_a_device_that_is_not_here(tiny: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="openvino finds no NPU here"):
        EdgeLLM(str(tiny), "npu")
    with EdgeLLM(str(tiny), "npu", prefix_store_bytes=0, fallback=True) as llm:
        assert llm.device == "onnxruntime:cpu"
        assert "not openvino:npu: the model has no openvino-npu variant" in llm.reason


def test_fallback_is_a_wish_for_any_of_auto(tmp_path: Path) -> None:
    wish = Wish("synthetic:tiny", "npu", fallback=True)
    assert wish.names == ("openvino:npu", "edge:cpu", "onnxruntime:cpu", "openvino:cpu")
    assert Wish("synthetic:tiny", "openvino:cpu", fallback=True).names[0] == "openvino:cpu"
    package = export_package("synthetic:tiny", tmp_path / "made", ["openvino"], "int4")
    store = Store(Home(tmp_path, tmp_path / "cache"))
    assert place(store, Wish(str(package.folder), "openvino:cpu", fallback=True)).reason == "it was asked for"
