"""Structures as TOML, which has no null, and has NaN."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.fuzz.mutation import unquoted


def as_toml(rng: random.Random, value: Any, tables: bool = False) -> bytes:
    """``tables``: with a head for each table rather than all in lines, as people write it."""
    if not isinstance(value, dict):
        return f"x = {_inline(value)}\n".encode(errors="replace")
    lines = [f"{_key(key)} = {_inline(each)}" for key, each in value.items() if not (tables and _is_table(each))]
    for key, each in value.items():
        if tables and isinstance(each, dict):
            lines += [f"[{_key(key)}]", *(f"{_key(name)} = {_inline(inner)}" for name, inner in each.items())]
        elif tables and _is_table(each):
            for item in each:
                lines += [f"[[{_key(key)}]]", *(f"{_key(name)} = {_inline(inner)}" for name, inner in item.items())]
    if rng.random() < 0.05:
        rng.shuffle(lines)
    return ("\n".join(lines) + "\n").encode(errors="replace")


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)
    )


def _key(key: Any) -> str:
    text = str(key)
    return text if text.replace("_", "").isalnum() and text.isascii() else json.dumps(text)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_inline(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return unquoted(json.dumps(value, ensure_ascii=False))
