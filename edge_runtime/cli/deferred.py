"""``edge-glm deferred``: requests that are answered later."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from typing import Any

import msgspec

from edge_runtime.deferred.deferrals import Ticket, ticket
from edge_runtime.deferred.queue import Queue
from edge_runtime.errors import ConfigError
from edge_runtime.paths import home


def deferred(arguments: argparse.Namespace) -> int:
    path = home().deferred
    if not path.is_file():
        if arguments.id is None:
            print("[]" if arguments.json else "no request waits")
            return 0
        raise ConfigError(f"there is no deferred request {arguments.id}")
    queue = Queue(path)
    try:
        return _one(queue, arguments) if arguments.id is not None else _all(queue, arguments)
    finally:
        queue.close()


def _all(queue: Queue, arguments: argparse.Namespace) -> int:
    tickets = [ticket(entry) for entry in queue.entries()]
    if arguments.json:
        print(json.dumps([_plain(each) for each in tickets], indent=2, ensure_ascii=False))
        return 0
    for each in tickets:
        when = datetime.fromtimestamp(each.created).strftime("%Y-%m-%d %H:%M:%S")
        why = each.waits_for or (each.failure.error if each.failure else "")
        print(f"{each.id}  {when}  {each.state:<8}{why}")
    if not tickets:
        print("no request waits")
    return 0


def _one(queue: Queue, arguments: argparse.Namespace) -> int:
    entry = queue.get(arguments.id)
    if entry is None:
        raise ConfigError(f"there is no deferred request {arguments.id}")
    if arguments.remove:
        queue.remove(entry.id)
        return 0
    found = ticket(entry)
    if arguments.json or found.answer is None:
        print(json.dumps(_plain(found), indent=2, ensure_ascii=False))
    else:
        print("\n".join(choice.text for choice in found.answer.choices))
    return 0


def _plain(each: Ticket) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(each)
    return plain
