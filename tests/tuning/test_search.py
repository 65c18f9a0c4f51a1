"""The search finds what is faster, believes no luck, and keeps what it learned whatever ends it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest

from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.tuning import search as search_module
from edge_runtime.tuning import space
from edge_runtime.tuning.records import Options, Run, Setup, Verdict
from edge_runtime.tuning.search import CONFIRMATION, MARGIN, Search, bounds
from edge_runtime.tuning.space import Scope
from tests.tuning.machine import DEFAULT, Machine, new_run, scope

ONE_DEVICE = scope(devices=("edge:cpu",))
PINNED = Setup("edge:cpu", Options(pinning=True))


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two threads each, which all may be used."""
    monkeypatch.setattr(space, "physical_cores", lambda: 4)
    monkeypatch.setattr(space, "cores", lambda: 8)
    monkeypatch.setattr("devices.hints.core_groups", lambda: ((0, 4), (1, 5), (2, 6), (3, 7)))
    monkeypatch.setattr("devices.hints.physical_cores", lambda: 4)
    monkeypatch.setattr("devices.hints.cores", lambda: 8)
    monkeypatch.setattr("devices.hints.cores_differ", lambda: False)


def look(machine: Machine, within: Scope = ONE_DEVICE, **changes: object) -> Run:
    run = new_run(**changes)
    Search(run, within, machine.measure, clock=machine.clock).go()
    return run


def verdicts(run: Run, lever: str) -> list[Verdict]:
    return [each for each in run.verdicts if each.lever == lever]


def alike(setup: Setup) -> float:
    return 1.0


def few_threads(setup: Setup) -> float:
    """Two threads are a quarter faster than what the engine takes, and long chunks add a fifth."""
    slow = {None: 1.25, 1: 2.0, 2: 1.0, 4: 1.25, 8: 1.5}[setup.options.threads]
    return slow / (1.2 if setup.options.prefill_chunk == 512 else 1.0)


# --- what is found ----------------------------------------------------------------------------------------------------


def test_gains_of_several_levers_add_up() -> None:
    run = look(Machine(few_threads))
    assert run.best == run.candidate == Setup("edge:cpu", Options(threads=2, prefill_chunk=512))
    assert run.gain == pytest.approx(1.5)
    won = [each for each in run.verdicts if each.outcome == "won"]
    assert [each.lever for each in won] == ["threads", "chunk", CONFIRMATION]
    assert [each.gain for each in won] == pytest.approx([1.25, 1.2, 1.5])
    assert won[1].against == Setup("edge:cpu", Options(threads=2))
    assert won[2].against == DEFAULT
    assert all(trial.failure is None and trial.figures is not None for trial in run.trials)


def test_a_device_comes_first_and_the_rest_is_tried_on_it() -> None:
    def seconds(setup: Setup) -> float:
        return {"edge:cpu": 1.0, "onnxruntime:cpu": 2.0, "openvino:cpu": 0.5}[setup.device]

    run = look(Machine(seconds), scope())
    assert run.best == Setup("openvino:cpu")
    assert run.gain == pytest.approx(2)
    later = [each for each in run.verdicts if each.lever not in ("device", CONFIRMATION)]
    assert later
    assert all(each.setup.device == "openvino:cpu" for each in later)


def test_nothing_faster_leaves_the_default() -> None:
    run = look(Machine(alike))
    assert (run.best, run.gain) == (DEFAULT, None)
    assert {each.outcome for each in run.verdicts} == {"lost"}
    assert not verdicts(run, CONFIRMATION)


def test_a_gain_within_the_margin_is_none() -> None:
    run = look(Machine(lambda setup: 1 / (MARGIN - 0.001) if setup.options.pinning else 1.0))
    assert run.best == DEFAULT


def test_rounds_are_interleaved_and_the_first_place_moves_on() -> None:
    machine = Machine(lambda setup: 0.8 if setup.options.pinning else 1.0)
    run = look(machine)
    trials = [trial.setup for trial in run.trials if trial.lever == "pinning"]
    assert trials == [DEFAULT, PINNED, PINNED, DEFAULT, DEFAULT, PINNED]
    confirming = [trial.setup for trial in run.trials if trial.lever == CONFIRMATION]
    assert confirming == [DEFAULT, PINNED, PINNED, DEFAULT] * 3


def test_a_slow_challenger_costs_one_round() -> None:
    machine = Machine(few_threads)
    look(machine)
    assert machine.asked.count(Setup("edge:cpu", Options(threads=1))) == 1


# --- a machine that does other things as well -------------------------------------------------------------------------


def test_noise_is_not_taken_for_a_gain() -> None:
    """Levers by the dozen that change nothing, at 10 % of noise: what wins in the search by luck is not confirmed."""
    taken = [look(Machine(alike, noise=0.1, seed=seed)).best != DEFAULT for seed in range(60)]
    assert sum(taken) <= 3


def test_a_gain_is_found_in_the_noise() -> None:
    found = []
    for seed in range(20):
        run = look(Machine(lambda setup: 1 / 1.25 if setup.options.pinning else 1.0, noise=0.03, seed=seed))
        found.append(run.best is not None and run.best.options.pinning is True)
    assert sum(found) >= 18


def test_a_machine_that_becomes_faster_favours_nobody() -> None:
    """Each trial takes a hundredth less than the one before."""
    trials = itertools.count()
    run = look(Machine(lambda setup: 0.99 ** next(trials)))
    assert run.best == DEFAULT


def test_one_bad_run_of_the_default_decides_nothing() -> None:
    trials = itertools.count()

    def seconds(setup: Setup) -> float:
        return 3.0 if setup == DEFAULT and next(trials) == 1 else 1.0

    assert look(Machine(seconds)).best == DEFAULT


def test_luck_in_the_search_is_not_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    confirming = False

    def seconds(setup: Setup) -> float:
        return 0.8 if setup == PINNED and not confirming else 1.0

    machine = Machine(seconds)
    run = new_run()

    def watch(what: str, gone: float) -> None:
        nonlocal confirming
        confirming = what.startswith(CONFIRMATION)

    Search(run, ONE_DEVICE, machine.measure, watch, clock=machine.clock).go()
    assert run.candidate == PINNED
    assert (run.best, run.gain) == (DEFAULT, None)
    assert [each.outcome for each in verdicts(run, CONFIRMATION)] == ["lost"]


def test_the_bounds_are_students() -> None:
    """Against the distribution itself, its density integrated; and the mean's against the definition."""
    for freedom, quantile in enumerate(search_module._T95, start=1):
        x = np.linspace(-quantile, quantile, 2_000_001)
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        inside = np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
        assert inside == pytest.approx(0.90, abs=1e-4)
    gains = [1.1, 1.2, 1.4]
    low, high = bounds(gains)
    logs = np.log(gains)
    half = 2.920 * logs.std(ddof=1) / math.sqrt(3)
    assert [low, high] == pytest.approx([math.exp(logs.mean() - half), math.exp(logs.mean() + half)])
    assert bounds([1.5]) == (0, math.inf)


# --- what fails -------------------------------------------------------------------------------------------------------


def test_a_failure_is_a_row_and_not_the_end() -> None:
    def seconds(setup: Setup) -> float:
        if setup.device == "onnxruntime:cpu":
            raise EdgeError("the measuring process was ended by signal 9; is there enough memory?")
        return few_threads(setup)

    run = look(Machine(seconds), scope(devices=("edge:cpu", "onnxruntime:cpu")))
    assert run.best is not None
    assert run.best.options.threads == 2
    (verdict,) = verdicts(run, "device")
    assert verdict.outcome == "failed"
    assert verdict.why is not None
    assert "is there enough memory?" in verdict.why
    assert [trial.failure for trial in run.trials if trial.failure] == [verdict.why]


def test_a_default_that_fails_now_and_then_gives_no_ratio() -> None:
    trials = itertools.count()

    def seconds(setup: Setup) -> float:
        if setup == DEFAULT and next(trials) % 3 == 1:
            raise EdgeError("out of luck")
        return 0.5 if setup.options.pinning else 1.0

    run = look(Machine(seconds))
    assert run.best == PINNED
    assert run.gain == pytest.approx(2)


def test_a_default_that_cannot_be_measured() -> None:
    def seconds(setup: Setup) -> float:
        raise EdgeError("no such luck")

    run = new_run()
    machine = Machine(seconds)
    with pytest.raises(ConfigError, match=r"the default, edge:cpu, cannot be measured.*: no such luck"):
        Search(run, ONE_DEVICE, machine.measure, clock=machine.clock).go()
    assert [trial.failure for trial in run.trials] == ["no such luck"]
    assert run.best is None


# --- answers ----------------------------------------------------------------------------------------------------------


def faster_with_int8(setup: Setup) -> float:
    return 0.5 if setup.options.kv_type == "int8" else 1.0


def test_an_8_bit_cache_needs_permission() -> None:
    assert look(Machine(faster_with_int8)).best == DEFAULT
    run = look(Machine(faster_with_int8), scope(devices=("edge:cpu",), int8_kv=True))
    assert run.best == Setup("edge:cpu", Options(kv_type="int8"))


@pytest.mark.parametrize(("nll", "taken"), [(3.0149, True), (3.0151, False), (math.nan, False), (2.9, True)])
def test_what_loses_answers_is_not_taken(nll: float, taken: bool) -> None:
    machine = Machine(faster_with_int8)
    machine.nll = lambda setup: nll if setup.options.kv_type else 3.0
    run = look(machine, scope(devices=("edge:cpu",), int8_kv=True))
    assert (run.best != DEFAULT) == taken
    if not taken:
        (verdict,) = verdicts(run, "KV cache")
        assert verdict.outcome == "loses answers"
        assert verdict.why == f"the loss per token is {nll:.3f}, the default's 3.000"


def test_the_loss_is_told_where_answers_may_change() -> None:
    machine = Machine(alike)
    look(machine, scope(int8_kv=True))
    chunks = [Setup("edge:cpu", Options(prefill_chunk=chunk)) for chunk in (128, 512)]
    others = [Setup("onnxruntime:cpu"), Setup("openvino:cpu")]
    assert machine.scored == [DEFAULT, *others, *chunks, Setup("edge:cpu", Options(kv_type="int8"))]


def test_short_of_memory_nothing_is_tried_that_takes_more() -> None:
    machine = Machine(alike)
    look(machine, scope(budget=True))
    assert {setup.options.prefill_chunk for setup in machine.asked} == {None, 128}
    assert {setup.options.kv_type for setup in machine.asked} == {None}


# --- time, and Ctrl-C -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit_s", [1.0, 20.0, 50.0, 77.0, 120.0, 150.0, 200.0])
def test_the_time_limit_holds(limit_s: float) -> None:
    """A trial takes 5 s, or 2 s longer than what it is given at most."""
    machine = Machine(few_threads)
    run = new_run(limit_s=limit_s)
    with nullcontext() if limit_s > 6 else pytest.raises(ConfigError, match="more than the 1 s"):
        Search(run, ONE_DEVICE, machine.measure, clock=machine.clock).go()
    assert machine.now - 100 <= limit_s
    assert run.best in (None, DEFAULT) or run.gain is not None


def test_a_limit_that_is_used_up_by_the_default() -> None:
    run = look(Machine(few_threads), limit_s=9.0)
    assert len(run.trials) == 1
    assert {each.outcome for each in run.verdicts} == {"no time"}
    assert run.best == DEFAULT


def test_the_time_put_aside_goes_to_what_was_cut_short() -> None:
    """Time for the default, a round of threads, one of chunks and one of pinning, and four to confirm."""

    def seconds(setup: Setup) -> float:
        return 1.0 if setup == DEFAULT else 0.8 if setup == PINNED else 1.2

    run = look(Machine(seconds), limit_s=100.0)
    (cut,) = verdicts(run, "pinning")
    assert cut.outcome == "no time"
    assert len(cut.gains) == 1
    assert run.best == PINNED
    assert len(verdicts(run, CONFIRMATION)[0].gains) == 4


def test_those_are_tried_for_which_there_is_time() -> None:
    """Of four counts of threads two, after the default and what is put aside for confirming."""
    run = look(Machine(lambda setup: 1.0 if setup == DEFAULT else 1.4), limit_s=5 + 4 * 2 * 5 + 3.5 * 5)
    tried = {each.setup.options.threads: each.outcome for each in verdicts(run, "threads")}
    assert tried == {1: "lost", 2: "lost", 4: "no time", 8: "no time"}


def test_no_time_to_confirm_is_no_confirmation() -> None:
    """When the machine becomes so slow that what was put aside is not enough."""
    machine = Machine(lambda setup: 0.5 if setup.options.pinning else 1.0)
    run = new_run(limit_s=400.0)

    def watch(what: str, gone: float) -> None:
        if what.startswith(CONFIRMATION):
            machine.now += 200

    Search(run, ONE_DEVICE, machine.measure, watch, clock=machine.clock).go()
    assert run.candidate == PINNED
    assert run.best is None
    assert [each.outcome for each in verdicts(run, CONFIRMATION)] == ["no time"]


def test_a_challenger_that_hangs_is_given_up() -> None:
    machine = Machine(lambda setup: 1e6 if setup.options.threads == 1 else 1.0)
    run = look(machine)
    hung = [trial for trial in run.trials if trial.setup.options.threads == 1]
    assert [trial.took_s for trial in hung] == [pytest.approx(3 * 5 + 20)]
    assert hung[0].failure is not None


@pytest.mark.parametrize("count", [0, 1, 9, 30])
def test_what_was_learned_outlives_an_interruption(count: int) -> None:
    machine = Machine(few_threads)

    def interrupt(trials: int) -> None:
        if trials == count:
            raise KeyboardInterrupt

    machine.before = interrupt
    run, kept = new_run(), []
    search = Search(
        run, ONE_DEVICE, machine.measure, keep=lambda run: kept.append(len(run.trials)), clock=machine.clock
    )
    with pytest.raises(KeyboardInterrupt):
        search.go()
    assert len(run.trials) == count
    assert run.best is None  # not confirmed
    assert (run.candidate.options.threads == 2) == (count >= 9 + 4)
    assert kept == sorted(kept)
    assert set(kept) == set(range(1, count + 1))  # at each trial: a power cut hears no Ctrl-C


# --- history ----------------------------------------------------------------------------------------------------------


def earlier(seconds: Callable[[Setup], float], noise: float = 0.0) -> Run:
    return look(Machine(seconds, noise), scope(devices=("edge:cpu",), history=(PINNED,)))


def test_what_was_found_before_is_tried_first() -> None:
    run = earlier(lambda setup: 0.8 if setup.options.pinning else 1.0)
    assert run.trials[2].setup == PINNED
    assert run.best == PINNED
    assert not verdicts(run, "pinning")


def test_what_was_found_before_and_is_wrong_is_given_up() -> None:
    assert earlier(lambda setup: 1.2 if setup.options.pinning else 1.0).best == DEFAULT


def test_what_was_found_before_stays_while_it_is_not_found_wrong() -> None:
    times = iter([0.8, 1.3, 0.9, 1.4, 1.0])
    run = earlier(lambda setup: next(times) if setup == PINNED else 1.5 if setup != DEFAULT else 1.2)
    assert [each.outcome for each in verdicts(run, "history")] == ["within the noise"]
    assert run.best is None
