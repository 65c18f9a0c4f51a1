"""``edge-glm bench``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec

from devices.discovery import probe_device
from devices.names import parse_device
from edge_runtime.bench.compare import compare, read_baseline
from edge_runtime.bench.html import report
from edge_runtime.bench.job import Goodput, Job, LoadJob
from edge_runtime.bench.result import Result
from edge_runtime.bench.table import table
from edge_runtime.disk import why
from edge_runtime.errors import ConfigError, EdgeError, StorageError
from edge_runtime.machine import fingerprint
from edge_runtime.measurements import Measurements
from edge_runtime.paths import home
from edge_runtime.settings import load_settings
from edge_runtime.timing.observations import Observations
from edge_runtime.tuning.records import Options

_LOADING = ("device", "weights", "memory_budget", "threads", "kv_type", "batch_invariant")
_LOCAL = ("repeats", "shared_prefix", "copy", "nll", "timing")
_SERVER = ("model", "chat", "rate", "requests", "goodput", "api_key")
_LADDER = ("int4", "draft", "draft_device")
_ONE_RESULT = ("output", "html", "compare", "shared_prefix", "copy")
_SHAPE = ("prompt_tokens", "new_tokens", "concurrency", "seed")


def bench(arguments: argparse.Namespace) -> int:
    baseline = None if arguments.compare is None else read_baseline(Path(arguments.compare))
    for target in filter(None, (arguments.output, arguments.html)):
        if not Path(target).absolute().parent.is_dir():  # told now, not after minutes of measuring
            raise ConfigError(f"cannot write {target}: there is no folder {Path(target).absolute().parent}")
    if arguments.ladder:
        return _ladder(arguments)
    _refuse(arguments, _LADDER, "--{} is for a --ladder")
    if arguments.every_device:
        return _every(arguments)
    result = _local(arguments) if arguments.url is None else _server(arguments)
    comparison = None if baseline is None else compare(result, baseline, arguments.compare)
    data = msgspec.json.format(msgspec.json.encode(result))
    if arguments.output is not None:
        _write(arguments.output, data + b"\n")
    if arguments.html is not None:
        _write(arguments.html, report(result, comparison).encode())
    print(data.decode() if arguments.json else table(result, comparison))
    return 0


def _ladder(arguments: argparse.Namespace) -> int:
    """Prepared and measured rung by rung; what is done is told on a terminal."""
    others = ("every_device", "compare", "shared_prefix", "copy", "nll", "timing", "concurrency", "seed", "tuning")
    loading = ("weights", "kv_type", "batch_invariant")
    _refuse(arguments, ("url", *_SERVER, *others, *loading), "--{} has no meaning for a ladder; leave it out")
    if arguments.ref is None:
        raise ConfigError("a ladder needs a model reference")
    from edge_runtime.bench.ladder.climb import climb
    from edge_runtime.bench.ladder.job import Climb
    from edge_runtime.bench.ladder.report import ladder_page, ladder_table

    settings = load_settings({name: getattr(arguments, name) for name in ("threads", "memory_budget")})
    given = _given(arguments, "device", "prompt_tokens", "new_tokens", "repeats", *_LADDER)
    told = sys.stderr.isatty()
    job = Climb(ref=arguments.ref, threads=settings.threads, memory_budget=settings.memory_budget, **given)
    found = climb(job, lambda words: print(words, file=sys.stderr) if told else None)
    data = msgspec.json.format(msgspec.json.encode(found))
    if arguments.output is not None:
        _write(arguments.output, data + b"\n")
    if arguments.html is not None:
        _write(arguments.html, ladder_page(found).encode())
    print(data.decode() if arguments.json else ladder_table(found))
    return 0


def _every(arguments: argparse.Namespace) -> int:
    _refuse(arguments, ("url", "device", *_ONE_RESULT), "--{} is of one device; leave it out with --every-device")
    job = _job(arguments)
    from edge_runtime.bench.every import every_table, measure
    from edge_runtime.bench.process import run

    devices = [name for name in parse_device("auto") if probe_device(name).ready]
    found = measure(job, devices, run, lambda result: _keep(job, result))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        print(every_table(job, found, _speaks_for_auto(job)))
    return 0


def _local(arguments: argparse.Namespace) -> Result:
    job = _job(arguments)
    from edge_runtime.bench.process import run

    result = run(job)
    _keep(job, result)
    return result


def _job(arguments: argparse.Namespace) -> Job:
    _refuse(arguments, _SERVER, "--{} needs --url")
    if arguments.ref is None:
        raise ConfigError("bench needs a model reference to measure here, or --url for a server")
    settings = load_settings({name: getattr(arguments, name) for name in (*_LOADING, "tuning")})
    loading = {name: getattr(settings, name) for name in _LOADING} | {"weights": settings.format}
    tuning = None if settings.tuning else Options()
    given = {"timing": True} | _given(arguments, *_LOCAL, *_SHAPE)
    return Job(ref=arguments.ref, tuning=tuning, **loading, **given)


def _keep(job: Job, result: Result) -> None:
    """For ``auto`` and the timing model to go by."""
    if result.timed is not None:
        try:
            Observations(home().timing).keep(result.timed)
        except EdgeError as error:  # the figures themselves are worth more
            print(f"edge-glm: the times of single requests are not kept: {error}", file=sys.stderr)
    if not _speaks_for_auto(job):
        return
    from edge_runtime.bench.every import measurement

    machine = fingerprint()
    try:
        Measurements(home().measurements, machine).keep(measurement(result, machine))
    except EdgeError as error:  # the figures themselves are worth more
        print(f"edge-glm: the measurement is not kept for auto: {error}", file=sys.stderr)


def _speaks_for_auto(job: Job) -> bool:
    """Whether the model is opened for it as when nothing is said."""
    given = (job.memory_budget, job.threads, job.kv_type)
    return not any(each is not None for each in (*given, job.tuning)) and not job.batch_invariant


def _server(arguments: argparse.Namespace) -> Result:
    _refuse(arguments, (*_LOADING, "tuning", *_LOCAL), "--{} is for a model in this process; leave it out with --url")
    if arguments.ref is not None:
        raise ConfigError(f"with --url the server's model is named by --model, not {arguments.ref!r}")
    options = _given(arguments, *_SERVER, *_SHAPE)
    if options.pop("chat", False):
        options["endpoint"] = "chat"
    if "goodput" in options:
        options["goodput"] = Goodput.parse(options["goodput"])
    job = LoadJob(url=arguments.url, **options)

    from edge_runtime.bench.load import run

    return run(job)


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], message: str) -> None:
    for name in _given(arguments, *names):
        raise ConfigError(
            message.format(
                {"nll": "no-nll", "timing": "no-timing", "tuning": "no-tuning"}.get(name, name.replace("_", "-"))
            )
        )


def _write(path: str, data: bytes) -> None:
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {why(error)}") from error
