"""``edge-glm profile``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import msgspec

from edge_runtime.bench.job import Job
from edge_runtime.disk import why
from edge_runtime.errors import ConfigError, StorageError
from edge_runtime.settings import load_settings
from edge_runtime.tuning.records import Options

_LOADING = ("device", "weights", "memory_budget", "threads", "kv_type", "batch_invariant")
_SHAPE = ("prompt_tokens", "new_tokens", "concurrency", "seed")


def profile(arguments: argparse.Namespace) -> int:
    named = arguments.html or (None if arguments.json else "profile.html")
    page = None if named is None else Path(named)
    if page is not None:
        _check_writable(page)  # told now, not after minutes of measuring
    settings = load_settings({name: getattr(arguments, name) for name in (*_LOADING, "tuning")})
    if settings.weights == "auto":
        raise ConfigError("a profile is of one variant: name its --weights")
    loading = {name: getattr(settings, name) for name in _LOADING} | {"weights": settings.format}
    shape = {name: value for name in _SHAPE if (value := getattr(arguments, name)) is not None}
    tuning = None if settings.tuning else Options()
    job = Job(ref=arguments.ref, nll=False, tuning=tuning, **loading, **shape)
    from edge_runtime.profiling.html import report
    from edge_runtime.profiling.process import run
    from edge_runtime.profiling.table import table

    found = run(job, arguments.requests)
    print(msgspec.json.format(msgspec.json.encode(found.result)).decode() if arguments.json else table(found.result))
    if page is not None:
        try:
            page.write_text(report(found), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {page}: {why(error)}") from error
        if not arguments.json:
            print(f"\nwith pictures: {page}")
    return 0


def _check_writable(page: Path) -> None:
    folder = page.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"cannot write {page}: there is no folder {folder}")
    if page.is_dir():
        raise ConfigError(f"cannot write {page}: it is a folder; name a file in it with --html")
    if not os.access(page if page.exists() else folder, os.W_OK):
        raise ConfigError(f"cannot write {page}: no permission; name another file with --html")
