"""``edge-glm config``: what is set, and where."""

from __future__ import annotations

import argparse
import json
from typing import Any

from edge_runtime.settings import Origin, config_files, origins

_SECRETS = ("api_key",)


def config(arguments: argparse.Namespace) -> int:
    found = origins()
    files = [str(path.absolute()) for path in config_files()]
    if arguments.json:
        settings = {name: {"value": _shown(name, each.value), "source": each.source} for name, each in found.items()}
        print(json.dumps({"files": files, "settings": settings}, indent=2))
        return 0
    names, values = max(map(len, found)), [_text(name, each) for name, each in found.items()]
    width = min(max(map(len, values)), 40)
    for (name, each), value in zip(found.items(), values, strict=True):
        print(f"{name:{names}}  {value:{width}}  {each.source}")
    print(f"\nflags are stronger than EDGE_GLM_* variables, these than a file: {', else '.join(files)}")
    return 0


def _shown(name: str, value: Any) -> Any:
    return "(secret)" if name in _SECRETS and value is not None else value


def _text(name: str, found: Origin) -> str:
    value = _shown(name, found.value)
    return "-" if value is None or value == "" else value if isinstance(value, str) else json.dumps(value)
