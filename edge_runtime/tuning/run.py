"""A whole tuning: the model prepared, each trial measured in a process of its own, everything kept."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable

import msgspec

from devices.discovery import probe_device
from devices.names import KNOWN, parse_device
from edge_runtime.bench import process
from edge_runtime.bench.every import measurement, shapes
from edge_runtime.bench.job import Job
from edge_runtime.bench.machine import this_machine
from edge_runtime.bench.measure import now
from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.machine import fingerprint, versions
from edge_runtime.measurements import Measurement, Measurements, Workload
from edge_runtime.package import Package, Variant, Weights
from edge_runtime.paths import Home, home
from edge_runtime.placement import Wish, place
from edge_runtime.store import Store, pick_variant
from edge_runtime.timing.observations import Observations
from edge_runtime.tuning.log import TuningLog
from edge_runtime.tuning.records import Figures, Options, Run, Setup
from edge_runtime.tuning.search import CONFIRMATION, Search, Watch
from edge_runtime.tuning.space import Scope

TIMED_FROM_S = 120.0
"""Seconds of tuning from which single requests are timed at its end, as it was decided to open the model."""
TIMING_LIMIT_S = 90.0
"""Until that is given up."""
_REPEATS = 1
"""Measured rounds of a trial, after one to warm up: more trials tell more than longer ones."""
_log = logging.getLogger("edge_glm.tuning")


def tune(
    job: Job,
    workload: Workload = "one",
    *,
    limit_s: float = 300,
    int8_kv: bool = False,
    prepared: Callable[[Run], None] = lambda run: None,
    watch: Watch = lambda what, gone: None,
) -> Run:
    """Find out how ``job``'s model is best opened for ``workload``, and keep it.

    Of the job count its model, device, weights, memory budget and shape of requests. ``limit_s`` begins when the model
    is prepared; timing single requests (:data:`TIMED_FROM_S`) comes after it and takes some 20 s more. ``prepared``
    gets the run when it begins, which holds at any time what has been learned, also after Ctrl-C.
    Raises ConfigError, and what :class:`edge_runtime.EdgeLLM` raises if the model cannot be opened as it comes.
    """
    if not 0 < limit_s < math.inf:
        raise ConfigError(f"--time-limit must be a number of seconds above 0, not {limit_s:g}")
    here, shape = home(), shapes(job)[workload]
    job = msgspec.structs.replace(job, tuning=Options(), repeats=_REPEATS, nll=False, **msgspec.structs.asdict(shape))
    load_average = this_machine().load_average  # now, while it is that of others
    process.prepare(job)
    placed = place(Store(here), Wish(job.ref, job.device, job.weights, workload))
    variants = _variants(placed.package, job, placed.variant.weights)
    digests = {device: variant.digest for device, variant in variants.items()}
    log, default = TuningLog(here.tuning, fingerprint()), Setup(placed.device.name)
    scope = Scope(
        tuple(variants),
        shape,
        placed.variant.weights,
        int8_kv=int8_kv,
        budget=job.memory_budget is not None,
        history=log.found(digests, workload),
    )
    run = Run(
        started=now(),
        machine=fingerprint(),
        versions=versions(),
        load_average=load_average,
        model=placed.package.name,
        variants=digests,
        weights=placed.variant.weights,
        workload=workload,
        shape=shape,
        memory_budget=job.memory_budget,
        limit_s=limit_s,
        default=default,
        candidate=default,
    )
    prepared(run)

    def measure(setup: Setup, score: bool, limit_s: float) -> Figures:
        return _figures(
            msgspec.structs.replace(job, device=setup.device, weights=run.weights, tuning=setup.options, nll=score),
            limit_s,
        )

    keep = _Keeping(log)
    try:
        Search(run, scope, measure, watch, keep=keep).go()
    finally:
        keep(run)
    _tell_auto(here, run)
    if limit_s >= TIMED_FROM_S:
        _time_requests(here, job, run)
    return run


def _variants(package: Package, job: Job, weights: Weights) -> dict[str, Variant]:
    """Device → the variant that it would be opened with, for all that ``job`` leaves to choose from."""
    found = {}
    for device in parse_device(job.device):
        variant = pick_variant(package, KNOWN[device].engine, job.weights)
        if variant is not None and variant.weights == weights and probe_device(device).ready:
            found[device] = variant
    return found


def _figures(job: Job, limit_s: float) -> Figures:
    result = process.measure(job, limit_s)
    assert result.prefill_tps is not None
    assert result.decode_tps is not None
    seconds = measurement(result, "").seconds
    return Figures(seconds, result.prefill_tps, result.decode_tps, result.nll, result.peak_rss_bytes)


class _Keeping:
    """Keeps runs if it can: the search itself is worth more. Why it cannot is said once."""

    def __init__(self, log: TuningLog) -> None:
        self._tuning_log = log
        self._said = ""

    def __call__(self, run: Run) -> None:
        try:
            self._tuning_log.keep(run)
        except EdgeError as error:
            if str(error) != self._said:
                self._said = str(error)
                _log.warning("what was tried is not kept: %s", error)


def _tell_auto(here: Home, run: Run) -> None:
    """Where another device than the default is the best, ``auto`` learns it as from ``edge-glm bench``."""
    if run.best is None or run.best.device == run.default.device:
        return
    seconds = {
        run.default.device: _seconds(run, run.default, CONFIRMATION),
        run.best.device: _seconds(run, run.best, CONFIRMATION),
    }
    slow = seconds[run.default.device]
    for device in run.variants:
        if device not in seconds and _times(run, Setup(device)):
            seconds[device] = max(_seconds(run, Setup(device)), slow)  # it is known only that it did not win
    kept = Measurements(here.measurements, run.machine)
    try:
        for device, each in seconds.items():
            kept.keep(Measurement(run.model, device, run.weights, run.shape, each, run.machine))
    except EdgeError as error:
        _log.warning("auto does not learn that %s is the best: %s", run.best.device, error)


def _time_requests(here: Home, job: Job, run: Run) -> None:
    """For the timing model, so that it speaks of the model as it is opened from now on."""
    best = run.best or run.default
    job = msgspec.structs.replace(job, device=best.device, weights=run.weights, tuning=best.options, timing=True)
    try:
        result = process.measure(job, TIMING_LIMIT_S)
        if result.timed is None:
            raise EdgeError(result.untimed or "the measuring process did not time any")
        Observations(here.timing).keep(result.timed)
    except EdgeError as error:  # what was found is worth more
        _log.warning("how long single requests take is not known: %s", error)


def _seconds(run: Run, setup: Setup, lever: str | None = None) -> float:
    return statistics.median(_times(run, setup, lever))


def _times(run: Run, setup: Setup, lever: str | None = None) -> list[float]:
    """Seconds of a request in the trials of ``setup``; those for ``lever``, if one is given."""
    trials = [each for each in run.trials if each.setup == setup and lever in (None, each.lever)]
    return [each.figures.seconds for each in trials if each.figures is not None]
