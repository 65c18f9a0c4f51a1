"""A machine that is slower than when it was measured."""

from __future__ import annotations

import pytest

from edge_runtime.engine import Engine
from edge_runtime.timing.foretold import foretell
from edge_runtime.timing.model import ALONE, Beside, TimingModel
from edge_runtime.timing.pace import FASTEST, FORGOTTEN_S, LEAST, MOST, SLOWEST, Pace
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import GREEDY, LetterTokenizer, collect
from tests.timing.known import CHUNK, observed

MODEL = TimingModel(observed(), CHUNK)


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def run(pace: Pace, clock: Clock, factor: float, prompt: int = 300, beside: int = 0) -> None:
    begun = pace.begin(prompt, 0, beside, 100 * beside)
    clock.now += factor * MODEL.running(prompt, 0, Beside(beside, 100 * beside))
    pace.first_token(begun)


@pytest.mark.parametrize(
    ("factor", "told"), [(1.0, 1.0), (1.1, 1.0), (1.7, 1.7), (0.8, 0.8), (100.0, SLOWEST), (0.01, FASTEST)]
)
def test_what_was_seen_lately_counts(factor: float, told: float) -> None:
    clock = Clock()
    pace = Pace(clock)
    for number in range(LEAST):
        assert pace.ratio(MODEL) == 1.0
        run(pace, clock, factor, 100 + 300 * number, beside=number)
    assert pace.ratio(MODEL) == pytest.approx(told)


def test_one_that_was_held_up_says_nothing() -> None:
    clock = Clock()
    pace = Pace(clock)
    for factor in (1.2, 9.0, 1.2, 1.2):
        run(pace, clock, factor)
    assert pace.ratio(MODEL) == pytest.approx(1.2)


def test_the_newest_count_and_are_forgotten() -> None:
    clock = Clock()
    pace = Pace(clock)
    for factor in (3.0,) * 5 + (1.5,) * MOST:
        run(pace, clock, factor)
    assert pace.ratio(MODEL) == pytest.approx(1.5)
    clock.now += FORGOTTEN_S + 1
    assert pace.ratio(MODEL) == 1.0


def test_it_scales_what_is_foretold_and_is_said() -> None:
    plain, slow = foretell(MODEL, 300, 0, ALONE), foretell(MODEL, 300, 0, ALONE, 1.5)
    assert slow.ms == pytest.approx(1.5 * plain.ms)
    assert slow.first_token.low == pytest.approx(1.5 * plain.first_token.low)
    assert str(slow).endswith("for 300 tokens, at 1.5 times what was measured")
    assert "times" not in str(plain)


def test_an_engine_notes_each_first_token_once() -> None:
    decoder = FakeDecoder()
    with Engine(decoder, LetterTokenizer(), vocab_size=decoder.vocab_size) as engine:
        for number in range(LEAST - 1):
            collect(engine.submit([1 + number] * 20, GREEDY))
        assert engine.pace.ratio(MODEL) == 1.0
        collect(engine.submit([9] * 20, GREEDY))
        assert engine.pace.ratio(MODEL) != 1.0
