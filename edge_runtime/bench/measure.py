"""A whole measurement in this process: the model opened, its scenarios run, their figures in one result."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from edge_runtime.bench import local, timing
from edge_runtime.bench.job import Job
from edge_runtime.bench.machine import peak_rss_bytes, this_machine
from edge_runtime.bench.requests import observe
from edge_runtime.bench.result import Result, Samples
from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.exporting import Progress
from edge_runtime.machine import fingerprint
from edge_runtime.timing.observations import Subject, TimedRun

TIMING_S = 45.0
"""That timing single requests takes at most, unless one round of them takes longer."""


def prepare(job: Job, progress: Progress) -> None:
    """Fetch, export and open the model once, so that a measurement finds everything as a second use would."""
    local.open_model(job, prefix_cache=False, progress=progress).close()


def measure(job: Job, started: float) -> Result:
    """``started``: when this process was, by ``time.time()``."""
    machine = this_machine()  # now, while the load is that of others
    opening = time.perf_counter()
    with closing(local.open_model(job, prefix_cache=False)) as llm:
        load_s = time.perf_counter() - opening
        local.first_token(llm, job)
        start_s = time.time() - started
        figures = _speed(job, local.speed(llm, job))
        peak = peak_rss_bytes()  # before scoring, which holds logits of many tokens
        nll, nll_tokens = local.loss(llm) if job.nll else (None, None)
        model, device, weights, tuned = llm.model_id, llm.device, llm.variant.weights, llm.tuned
    prefix = None
    if job.shared_prefix is not None:
        with closing(local.open_model(job, prefix_cache=True)) as llm:
            prefix = local.shared_prefix(llm, job, job.shared_prefix)
    timed = untimed = None
    if job.timing:
        try:
            timed = _timed(job, figures["prefill_tps"])
        except EdgeError as error:  # what was measured is worth having without
            untimed = str(error)
    copying = None
    if job.copy:
        with (
            closing(local.open_model(job, prefix_cache=False)) as plain,
            closing(local.open_model(job, prefix_cache=False, prompt_lookup=True)) as drafting,
        ):
            copying = local.copying(plain, drafting, job)
    return Result(
        created=now(),
        model=model,
        device=device,
        weights=weights,
        tuned=tuned,
        prompt_tokens=job.prompt_tokens,
        new_tokens=job.new_tokens,
        concurrency=job.concurrency,
        seed=job.seed,
        load_s=load_s,
        start_s=start_s,
        peak_rss_bytes=peak,
        nll=nll,
        nll_tokens=nll_tokens,
        shared_prefix=prefix,
        timed=timed,
        untimed=untimed,
        copying=copying,
        machine=machine,
        **figures,
    )


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _timed(job: Job, prefill_tps: float) -> TimedRun:
    with closing(local.open_model(job, prefix_cache=True)) as llm:
        found = observe(llm, prefill_tps, TIMING_S, job.seed)
        subject = Subject.of(llm.variant, llm.device, llm.options, fingerprint())
        return TimedRun(subject=subject, chunk=llm.limits.prefill_chunk, created=now(), observations=found)


def _speed(job: Job, rounds: Sequence[Sequence[local.Stream]]) -> dict[str, Any]:
    by_round = [[stream.times for stream in streams] for streams in rounds]
    rates = [rate for streams in by_round if (rate := timing.decode_rate(streams)) is not None]
    if not rates:
        raise ConfigError(
            f"--new-tokens {job.new_tokens} leaves no time in which --concurrency {job.concurrency} decodes all at "
            "once: the first stream ended before the last had begun; raise it"
        )
    return {
        "requests": sum(map(len, rounds)),
        "prefill_tps": statistics.median(timing.prefill_rate(streams, job.prompt_tokens) for streams in by_round),
        "decode_tps": statistics.median(rates),
        "shares": local.shares(rounds),
        **stream_figures([stream for streams in by_round for stream in streams]),
    }


def stream_figures(streams: Sequence[timing.StreamTimes]) -> dict[str, Any]:
    """The fields of a result that come from single streams."""
    ttft = [stream.ttft for stream in streams]
    tpot = [stream.tpot for stream in streams if stream.tpot is not None]
    return {
        "ttft_ms": timing.percentiles_ms(ttft),
        "tpot_ms": timing.percentiles_ms(tpot),
        "itl_ms": timing.percentiles_ms([gap for stream in streams for _, gap in stream.gaps()]),
        "samples": Samples(
            ttft_ms=[seconds * 1e3 for seconds in ttft],
            tpot_ms=[seconds * 1e3 for seconds in tpot],
            itl_by_place_ms=timing.itl_by_place_ms(streams),
        ),
    }
