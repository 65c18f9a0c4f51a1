"""Valid inputs made malformed: bytes, text, and structures of JSON's types. All from a ``random.Random`` of its caller.

The ways are those of the field (AFL's deterministic and havoc stages; libFuzzer's dictionaries): flipped bits, cut and
doubled pieces, numbers at the edges of their types, pieces of other inputs, and for structures fields that are gone, of
another type, too large or nested too deep. :func:`vary` leaves types and shapes as they are, so that what stands behind
the readers sees something, too.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

MOST = 200_000
"""Bytes of an input that has been made longer."""
EDGES = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63)
NOT_UTF8 = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80", b"\xe2\x82")
_RAW = "\ue000"
"""In a structure, a string that begins with it becomes the rest as it is: what no JSON library would write."""
DEPTH = 20_000
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, -0.0, *EDGES, -(2**31), -(2**63), 2**64, 10**30, 10**400, 1e308, 1e-320,
    float("nan"), float("inf"), "", " ", "x", "0", "-1", "null", "\0", "\ud800", "é\u202e\U0001f600",
    "../../etc/passwd", "/dev/zero", "x" * 5000, "9" * 400, [], {}, [None], [[]], {"": None}, [0] * 1000,
    {"a": {"b": [1]}},
    _RAW + "9" * 5000, _RAW + "[" * DEPTH + "]" * DEPTH, _RAW + '{"a":' * DEPTH + "1" + "}" * DEPTH, _RAW + "1e999",
    *(_RAW + "[" * depth + "]" * depth for depth in (60, 200, 500, 900, 990)),
    _RAW + '"\\ud800"', _RAW + '"\\q"', _RAW + "01", _RAW + "tru", _RAW + "[1,]",
)  # fmt: skip


# --- bytes ------------------------------------------------------------------------------------------------------------


def damage(rng: random.Random, data: bytes, others: Sequence[bytes] = (b"",), most: int = 4) -> bytes:
    """One to ``most`` changes. ``others``: inputs that pieces may come from."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        rng.choice(_BYTE_WAYS)(rng, changed, others)
        del changed[MOST:]
    return bytes(changed)


def _place(rng: random.Random, data: bytearray) -> int:
    # headers, lengths and counts are at the beginning
    return int(len(data) * rng.random() ** rng.choice((1, 3)))


def _flip(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    if data:
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    if data:
        data[_place(rng, data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x0D, 0x20, 0x22, rng.randrange(256)))


def _number(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    size, layout = rng.choice(((2, "<H"), (4, "<I"), (8, "<Q"), (4, ">I"), (8, ">Q")))
    place = _place(rng, data)
    place -= place % rng.choice((1, 4, 8))
    if place + size <= len(data):
        number = rng.choice((*EDGES, 2**64 - 1, len(data), len(data) + 1)) % (1 << 8 * size)
        struct.pack_into(layout, data, place, number)


def _cut(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    del data[_place(rng, data) :]


def _remove(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    place = _place(rng, data)
    del data[place : place + rng.choice((1, 2, 4, 8, 64, 1000))]


def _insert(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    place = _place(rng, data)
    data[place:place] = rng.choice((rng.randbytes(rng.choice((1, 4, 8, 100))), b"\0" * 64, b" " * 64, *NOT_UTF8))


def _double(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    place = _place(rng, data)
    piece = data[place : place + rng.choice((1, 4, 16, 200))]
    data[place:place] = piece * rng.choice((1, 2, 100, 1000))


def _splice(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    start = rng.randrange(len(other) + 1)
    piece = other[start : start + rng.choice((8, 64, 1000, 10_000))]
    place = _place(rng, data)
    data[place : place + rng.choice((0, len(piece)))] = piece


_BYTE_WAYS = (_flip, _flip, _set, _number, _number, _cut, _remove, _insert, _double, _splice)


# --- structures -------------------------------------------------------------------------------------------------------

Made = Callable[[], Any]
"""Gives another structure of JSON's types."""


def disturb(rng: random.Random, value: Any, made: Made, most: int = 3) -> Any:
    """A copy of a structure of JSON's types, changed in one to ``most`` places."""
    copy = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, most)):
        places = list(_places(copy))
        if not places:
            return _any(rng)
        # as often near the root as among the many leaves
        depth = rng.choice([len(path) for path, _ in places])
        path, holder = rng.choice([place for place in places if len(place[0]) == depth])
        rng.choice(_STRUCTURE_WAYS)(rng, holder, path[-1], copy, made)
    return copy


def _any(rng: random.Random) -> Any:
    """A copy, for it may be changed in its turn."""
    return deepcopy(rng.choice(VALUES))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Of every value inside: the way to it, and what holds it."""
    found: list[tuple[tuple[Any, ...], Any]] = []
    pending = [(value, path)]
    while pending:
        holder, way = pending.pop()
        if not isinstance(holder, dict | list):
            continue
        for key in list(holder) if isinstance(holder, dict) else range(min(len(holder), 50)):
            found.append(((*way, key), holder))
            pending.append((holder[key], (*way, key)))
    return found


def _replace(rng: random.Random, holder: Any, key: Any, root: Any, made: Made) -> None:
    holder[key] = _any(rng)


def _invent(rng: random.Random, holder: Any, key: Any, root: Any, made: Made) -> None:
    holder[key] = made()


def _drop(rng: random.Random, holder: Any, key: Any, root: Any, made: Made) -> None:
    del holder[key]


def _retype(rng: random.Random, holder: Any, key: Any, root: Any, made: Made) -> None:
    value = holder[key]
    ways: list[Any] = [[value], {"value": value}, str(value)[:5000], [value, value]]
    if isinstance(value, int | float):
        ways += [float(value) if abs(value) < 1e300 else 0.5, -value, bool(value), value + 1, value - 1, str(value)]
    if isinstance(value, str):
        ways += [value.upper(), value[:-1], value + "\0", value * 50, list(value[:50]), "\n" + value]
    if isinstance(value, list):
        ways += [
            {str(place): each for place, each in enumerate(value)},
            value[:-1],
            value * 2,
            (value or [None])[0],
            value[::-1],
        ]
    if isinstance(value, dict):
        ways += [list(value), list(value.values()), {key.upper(): each for key, each in value.items()}]
    holder[key] = rng.choice(ways)


def _rename(rng: random.Random, holder: Any, key: Any, root: Any, made: Made) -> None:
    if isinstance(holder, dict):
        holder[rng.choice((f"{key}x", key[:-1], "", "__class__", key.upper(), "x" * 3000))] = holder.pop(key)
    else:
        holder.insert(key, _any(rng))


def _add(rng: random.Random, holder: Any, key: Any, root: Any, made: Made) -> None:
    if isinstance(holder, dict):
        holder[rng.choice(("extra", "\0", "type", "id", "name"))] = _any(rng)
    else:
        holder.append(deepcopy(rng.choice((made(), *holder))))


def _move(rng: random.Random, holder: Any, key: Any, root: Any, made: Made) -> None:
    path, other = rng.choice(_places(root))
    holder[key] = json.loads(json.dumps(other[path[-1]]))


def _edge(rng: random.Random, holder: Any, key: Any, root: Any, made: Made) -> None:
    """A number near a limit, where a number is."""
    if isinstance(holder[key], int | float):
        holder[key] = rng.choice(EDGES) * rng.choice((1, -1)) + rng.choice((0, 0.5))
    else:
        _replace(rng, holder, key, root, made)


_STRUCTURE_WAYS = (_replace, _replace, _invent, _drop, _retype, _retype, _rename, _add, _move, _edge)


def vary(rng: random.Random, value: Any, others: Sequence[Any], words: Mapping[str, Sequence[Any]]) -> Any:
    """A copy of a sound structure, changed in one to four places, where types and shapes stay. ``others``: sound ones
    that pieces may come from. ``words``: under a key, what else may stand there; nothing: it stays."""
    copy = deepcopy(value)
    for _ in range(rng.randint(1, 4)):
        places = list(_places(copy))
        depth = rng.choice([len(path) for path, _ in places])
        path, holder = rng.choice([place for place in places if len(place[0]) == depth])
        key, name = path[-1], next((each for each in reversed(path) if isinstance(each, str)), "")
        if name in words:
            if words[name] and not isinstance(holder[key], dict | list):
                holder[key] = deepcopy(rng.choice(words[name]))
            continue
        alike = [
            inner[way[-1]]
            for other in (copy, *others)
            for way, inner in _places(other)
            if _shape(inner[way[-1]]) == _shape(holder[key]) and (way[-1] == key or isinstance(key, int))
        ]
        holder[key] = deepcopy(rng.choice(alike)) if alike and rng.random() < 0.5 else _near(rng, holder[key])
    return copy


def _shape(value: Any) -> object:
    return frozenset(value) if isinstance(value, dict) else type(value)


def _near(rng: random.Random, value: Any) -> Any:
    """Of the same type and shape."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((0, 1, 2, 1000, value + 1, max(value - 1, 0), value * 2))
    if isinstance(value, float):
        return value * rng.choice((0.0, 0.001, 0.5, 2.0, 1000.0))
    if isinstance(value, str):
        return rng.choice(
            (value * 2, value[:-1] or "a", value[::-1], value.upper(), f" {value}", f"{value}é\u3042", "a")
        )
    if isinstance(value, list) and value:
        place = rng.randrange(len(value))
        ways = (value[:place] + value[place + 1 :], [*value, value[place]], value[::-1], value * 2)
        return deepcopy(rng.choice(ways))
    return value


def as_json(rng: random.Random, value: Any) -> bytes:
    """``value`` as a file or body of it may look: indented or not, with what JSON does not have (NaN, halves of
    surrogate pairs, raw pieces), now and then with a key twice, another encoding or damaged bytes."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, None, 1)))
    text = unquoted(text)
    if rng.random() < 0.03 and text.startswith("{"):
        text = text[0] + text[1:].rstrip("}") + "," + text[1:]
    encoding = rng.choice(("utf-8",) * 30 + ("utf-16", "utf-8-sig", "latin-1"))
    data = text.encode(encoding, "surrogatepass" if encoding == "utf-8" and rng.random() < 0.5 else "replace")
    return damage(rng, data, most=2) if rng.random() < 0.1 else data


def unquoted(text: str) -> str:
    """With the strings that stand for raw pieces replaced by these."""
    for mark in (f'"{_RAW}', f'"{json.dumps(_RAW)[1:-1]}'):
        while (start := text.find(mark)) >= 0:
            raw, end = json.JSONDecoder().raw_decode(text, start)
            text = text[:start] + raw.removeprefix(_RAW) + text[end:]
    return text


# --- text -------------------------------------------------------------------------------------------------------------


def rearrange(rng: random.Random, tokens: Sequence[str], others: Sequence[Sequence[str]], words: Sequence[str]) -> str:
    """A text from its ``tokens``, some of them gone, doubled, swapped, or replaced by ``words`` or by a piece of one of
    ``others``."""
    made = list(tokens)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(made) + 1), rng.choice((1, 1, 2, 5, 20))
        way = rng.randrange(6)
        if way == 0:
            del made[place : place + length]
        elif way == 1:
            made[place:place] = made[place : place + length] * rng.choice((1, 2, 50))
        elif way == 2:
            made[place : place + length] = reversed(made[place : place + length])
        elif way == 3:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            made[place : place + rng.choice((0, length))] = other[start : start + length]
        else:
            made[place : place + (way == 4)] = [rng.choice(words)]
        del made[20_000:]
    return "".join(made)[:MOST]
