"""``edge-glm ps`` and ``edge-glm stop``: what a running server has open."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from typing import Any

import httpx2

from edge_runtime.columns import columns
from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.memory import format_bytes
from edge_runtime.settings import load_settings


def ps(arguments: argparse.Namespace) -> int:
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


def stop(arguments: argparse.Namespace) -> int:
    stopped = _ask(arguments, "POST", "/v1/models/stop", {"model": arguments.model})["stopped"]
    print(f"{arguments.model} is closed once nobody uses it" if stopped else f"{arguments.model} was not open")
    return 0


def _left(expires: str) -> int:
    then = datetime.fromisoformat(expires.replace("Z", "+00:00"))
    return max(round((then - datetime.now(UTC)).total_seconds()), 0)


def _ask(arguments: argparse.Namespace, method: str, path: str, body: Any = None) -> Any:
    settings = load_settings({"api_key": arguments.api_key})
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
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
