"""``edge-glm tune``."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing

import msgspec

from edge_runtime.bench.job import Job
from edge_runtime.cli.progress import TimeBar
from edge_runtime.paths import home
from edge_runtime.settings import load_settings
from edge_runtime.tuning.records import Run
from edge_runtime.tuning.table import table

_LOADING = ("device", "weights", "memory_budget")
_SHAPE = ("prompt_tokens", "new_tokens")


def tune(arguments: argparse.Namespace) -> int:
    settings = load_settings({name: getattr(arguments, name) for name in (*_LOADING, "workload")})
    loading = {name: getattr(settings, name) for name in _LOADING} | {"weights": settings.format}
    shape = {name: value for name in _SHAPE if (value := getattr(arguments, name)) is not None}
    job = Job(ref=arguments.ref, **loading, **shape)
    from edge_runtime.tuning.run import tune as search

    runs: list[Run] = []
    try:
        with closing(TimeBar(arguments.time_limit)) as bar:
            run = search(
                job,
                settings.workload or "one",
                limit_s=arguments.time_limit,
                int8_kv=arguments.allow_int8_kv,
                prepared=runs.append,
                watch=bar,
            )
    except KeyboardInterrupt:
        if runs:
            kept = f"{len(runs[0].trials)} trials are kept in {home().tuning}"
            print(f"\nedge-glm: stopped; {kept}, and the next tune begins with the best of them", file=sys.stderr)
        raise
    print(msgspec.json.format(msgspec.json.encode(run)).decode() if arguments.json else table(run))
    return 0
