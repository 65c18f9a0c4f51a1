"""``edge-glm ps``, ``edge-glm stop`` and ``edge-glm slo``: what a running server has open, and how it fares."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2

from edge_runtime.columns import columns
from edge_runtime.disk import why
from edge_runtime.errors import ConfigError, EdgeError, StorageError
from edge_runtime.memory import format_bytes
from edge_runtime.settings import load_settings


def ps(arguments: argparse.Namespace) -> int:
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit is at least 1, not {arguments.limit}")
    if arguments.chrome is not None:
        return _chrome(arguments)
    if arguments.requests:
        return _requests(arguments)
    models = _ask(arguments, "GET", "/api/ps")["models"]
    if arguments.json:
        print(json.dumps(models, indent=2))
        return 0
    rows = []
    for model in models:
        ours = model["edge_glm"]
        left = "pinned" if ours["pinned"] else f"closes in {_left(model['expires_at'])} s"
        used = f", {ours['users']} at work" if ours["users"] else ""
        rows.append([model["name"], ours["device"], format_bytes(model["size"]), left + used])
    if rows:
        print(columns(rows, "l"))
    return 0


def _requests(arguments: argparse.Namespace) -> int:
    """Each with its longest parts."""
    traces = _ask(arguments, "GET", f"/traces?limit={arguments.limit or 20}")["data"]
    if arguments.json:
        print(json.dumps(traces, indent=2))
        return 0
    rows = [["at", "path", "status", "tier", "tokens", "ms", "of which"]]
    for trace in traces:
        times = dict(trace["ms"])
        total = times.pop("total")
        longest = sorted(times.items(), key=lambda each: -each[1])[:3]
        tokens = f"{trace['prompt_tokens']}+{trace['completion_tokens']}" if "prompt_tokens" in trace else ""
        at = datetime.fromtimestamp(trace["started"]).strftime("%H:%M:%S")
        said = ", ".join(f"{part} {each:.0f}" for part, each in longest)
        rows.append([at, trace["path"], str(trace["status"]), trace.get("tier", ""), tokens, f"{total:.0f}", said])
    print(columns(rows, "lllllrl", head=True) if len(rows) > 1 else "no request has ended yet")
    return 0


_ALL = 10**9


def _chrome(arguments: argparse.Namespace) -> int:
    spans = _ask(arguments, "GET", f"/traces?format=chrome&limit={arguments.limit or _ALL}")
    path = Path(arguments.chrome)
    try:
        path.write_text(json.dumps(spans), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {why(error)}") from error
    print(f"{path}: open it at https://ui.perfetto.dev, which reads it in the browser")
    return 0


def stop(arguments: argparse.Namespace) -> int:
    stopped = _ask(arguments, "POST", "/v1/models/stop", {"model": arguments.model})["stopped"]
    print(f"{arguments.model} is closed once nobody uses it" if stopped else f"{arguments.model} was not open")
    return 0


def slo(arguments: argparse.Namespace) -> int:
    """A row for each class that has a target, then the newest misses."""
    report = _ask(arguments, "GET", "/slo")
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    if not report["classes"]:
        print("no request of a class with a latency target has ended yet")
        return 0
    rows = [["class", "wants", "requests", "met", "missed for"]]
    for each in report["classes"]:
        targets = {"first token": each["wanted_ttft_ms"], "all": each["wanted_total_ms"]}
        wants = ", ".join(f"{name} {limit:g} ms" for name, limit in targets.items() if limit is not None)
        missed = ", ".join(f"{reason} {count}" for reason, count in each["missed"].items())
        rows.append([each["class"], wants, str(each["requests"]), f"{each['share']:.1%}", missed])
    print(columns(rows, "llrrl", head=True))
    if report["misses"]:
        print("\nnewest misses")
        print(columns([_MISS_HEAD, *map(_miss_row, report["misses"][:_MISSES_SHOWN])], "llllrrrl", head=True))
    return 0


_MISSES_SHOWN = 10
_MISS_HEAD = ["at", "class", "tier", "reason", "tokens", "first ms", "all ms", "spent on"]


def _miss_row(miss: dict[str, Any]) -> list[str]:
    at = datetime.fromtimestamp(miss["started"]).strftime("%H:%M:%S")
    first = "" if miss["ttft_ms"] is None else f"{miss['ttft_ms']:.0f}"
    longest = sorted(miss["spent_ms"].items(), key=lambda each: -each[1])[:3]
    spent = ", ".join(f"{kind} {took:.0f}" for kind, took in longest)
    tokens = f"{miss['prompt_tokens']}+{miss['completion_tokens']}"
    return [at, miss["class"], miss["tier"], miss["reason"], tokens, first, f"{miss['total_ms']:.0f}", spent]


def _left(expires: str) -> int:
    then = datetime.fromisoformat(expires.replace("Z", "+00:00"))
    return max(round((then - datetime.now(UTC)).total_seconds()), 0)


def _ask(arguments: argparse.Namespace, method: str, path: str, body: Any = None) -> Any:
    settings = load_settings({"api_key": arguments.api_key})
    everywhere = settings.host in ("0.0.0.0", "::")  # nosec B104  # it is compared, nothing is bound
    host = "127.0.0.1" if everywhere else settings.host
    url = arguments.url or f"http://{host}:{settings.port}"
    headers = {} if settings.api_key is None else {"authorization": f"Bearer {settings.api_key}"}
    try:
        answer = httpx2.request(method, url.rstrip("/") + path, json=body, headers=headers, timeout=30)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ConfigError(f"there is no server at {url} ({error}): name it with --url") from error
    try:
        told = answer.json()
    except ValueError as error:
        raise ConfigError(f"{url} is no edge-glm: it answers with status {answer.status_code} and no JSON") from error
    if answer.status_code != 200:
        found = told.get("error") if isinstance(told, dict) else None
        raise EdgeError(found["message"] if isinstance(found, dict) else f"{url} answers with {answer.status_code}")
    return told
