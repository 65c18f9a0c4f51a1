"""A device that fails is put aside, the next takes over, and nobody is left without an answer or an error."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from devices.base import Step
from devices.errors import DeviceUnavailable, EngineError
from edge_runtime.engine import Engine, Successor
from edge_runtime.errors import EdgeError, EngineStopped, PromptTooLong
from edge_runtime.failover import Failover
from edge_runtime.loading import Loaded
from edge_runtime.placement import Placement
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import Gate, LetterTokenizer, collect, greedy, prompt
from tests.runtime.machine import Failing, Machine, submit

LONG = SamplingParams(temperature=0, max_tokens=40)


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
