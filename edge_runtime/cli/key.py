"""``edge-glm key``."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime

from edge_runtime.errors import ConfigError
from edge_runtime.keys import KeyRing
from edge_runtime.paths import home


def key(arguments: argparse.Namespace) -> int:
    if (arguments.name is None) != (arguments.action == "list"):
        raise ConfigError("name the key: edge-glm key add NAME" if arguments.name is None else "key list takes no name")
    ring = KeyRing(home().keys)
    return {"add": _add, "list": _list, "rm": _remove}[arguments.action](ring, arguments)


def _add(ring: KeyRing, arguments: argparse.Namespace) -> int:
    secret = ring.add(arguments.name, arguments.rate_limit)
    print(secret)
    print("Keep it: only its SHA-256 stays here. Every server here asks for a key from now on.", file=sys.stderr)
    return 0


def _list(ring: KeyRing, arguments: argparse.Namespace) -> int:
    if arguments.json:
        rows = [{"name": key.name, "created": key.created, "per_minute": key.per_minute} for key in ring.keys]
        print(json.dumps(rows, indent=2))
        return 0
    width = max((len(key.name) for key in ring.keys), default=0)
    for key in ring.keys:
        made = datetime.fromtimestamp(key.created).strftime("%Y-%m-%d %H:%M")
        limit = "" if key.per_minute is None else f"  {key.per_minute} requests a minute"
        print(f"{key.name:{width}}  made {made}{limit}")
    return 0


def _remove(ring: KeyRing, arguments: argparse.Namespace) -> int:
    ring.remove(arguments.name)
    print(f"removed {arguments.name}")
    return 0
