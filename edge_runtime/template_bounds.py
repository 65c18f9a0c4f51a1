"""How much a template may take, and what its operations cost. See :mod:`edge_runtime.template_sandbox`.

A unit is about a byte. Costs are upper bounds known before the operation runs, or the size of what it made when
that cannot be much larger than what went in.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, Sequence, ValuesView
from functools import wraps
from types import GeneratorType
from typing import Any

from jinja2 import Environment
from jinja2.sandbox import SandboxedFormatter
from jinja2.utils import Namespace

from edge_runtime.errors import TemplateError

BASE_UNITS = 8 * 2**20
UNITS_PER_INPUT_UNIT = 32
"""A template may handle the messages this many times over: each filter, comparison and copy counts once."""
SECONDS = 0.5
"""Processor time of the rendering thread. A usual template takes well under a millisecond per message."""
ITEM = 16
"""Units of a number or of an element's place in a container."""
MAX_BITS = 8192


class Meter:
    """What one rendering may still spend; the allowance grows with its input."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.depth = 0
        self._left = 2**62
        self._wall = self._cpu_end = float("inf")
        self.spend_on(names)
        self._left = BASE_UNITS + UNITS_PER_INPUT_UNIT * (2**62 - self._left)
        self._wall = time.monotonic() + SECONDS
        self._cpu_end = time.thread_time() + SECONDS

    def spend(self, units: int) -> None:
        self._left -= units + ITEM
        if self._left < 0:
            raise TemplateError("the chat template was stopped: it makes too much text or too many values", "messages")
        if time.monotonic() > self._wall:
            if time.thread_time() > self._cpu_end:  # a busy machine is not the template's fault
                raise TemplateError(f"the chat template was stopped: it ran longer than {SECONDS} s", "messages")
            self._wall = time.monotonic() + SECONDS / 10

    def spend_on(self, value: Any, times: int = 1) -> None:
        """The size of ``value`` as a tree: what it takes to print or compare it, shared parts counted each time."""
        if isinstance(value, str):
            return self.spend(len(value) * times)
        limit = self._left // max(times, 1)
        units = 0
        stack = [value]
        while stack:
            item = stack.pop()
            units += ITEM
            if isinstance(item, str):
                units += len(item)
            elif isinstance(item, int):
                if item.bit_length() > MAX_BITS:
                    raise TemplateError(f"the chat template was stopped: a number of over {MAX_BITS} bits", "messages")
                units += item.bit_length() // 2
            elif isinstance(item, dict):
                stack.extend(item)
                stack.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
                stack.extend(item)
            elif isinstance(item, Namespace):
                stack.append(object.__getattribute__(item, "_Namespace__attrs"))
            if units > limit:
                break
        return self.spend(units * times)

    def counted(self, values: Iterable[Any]) -> list[Any]:
        """``values`` in a list, each paid for as it comes."""
        made = []
        for value in values:
            self.spend_on(value)
            made.append(value)
        return made


# --- operators --------------------------------------------------------------------------------------------------------


def product_cost(operator: str, left: Any, right: Any) -> int:
    """Units of ``left operator right`` where the result can be far larger than its operands, else 0."""
    if operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
                return len(sequence) * max(count, 0) * (1 if isinstance(sequence, str) else ITEM)
    if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
        raise TemplateError(f"the chat template was stopped: a number of over {MAX_BITS} bits", "messages")
    return 0


_LONG_NUMBER = re.compile(r"\d{4,}")


def percent_format(meter: Meter, text: str, values: Any) -> str:
    """``text % values``, widths and precisions up to 999."""
    if _LONG_NUMBER.search(text) or "*" in text:
        raise TemplateError("the chat template was stopped: a % format with '*' or a width over 999", "messages")
    # each conversion may print all the values, padded
    meter.spend_on(values, times=1 + text.count("%"))
    meter.spend(len(text) + 999 * text.count("%"))
    result: str = str(text) % values
    return result


class Formatter(SandboxedFormatter):
    """``str.format``, widths and precisions up to 999."""

    def __init__(self, env: Environment, meter: Meter) -> None:
        super().__init__(env)
        self._meter = meter

    def format_field(self, value: Any, format_spec: str) -> Any:
        if _LONG_NUMBER.search(format_spec):
            raise TemplateError("the chat template was stopped: a format with a width over 999", "messages")
        self._meter.spend_on(value)
        self._meter.spend(999 if format_spec else 0)
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._meter.spend_on(value)
        return super().convert_field(value, conversion)


# --- methods of strings -----------------------------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ALLOWED_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(
        _words(
            "capitalize casefold center count endswith find format index isalnum isalpha isascii isdecimal "
            "isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix "
            "removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip "
            "swapcase title upper zfill"
        )
    ),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    float: frozenset(("is_integer",)),
}

StringCost = Callable[..., tuple[Any, ...]]
"""``cost(meter, text, *args, **kwargs)`` pays and returns the arguments to call the method with."""


def _pad(meter: Meter, text: str, width: int, *fill: str) -> tuple[Any, ...]:
    meter.spend(max(width, 0))
    return (width, *fill)


def _replace(meter: Meter, text: str, old: str, new: str, count: int = -1) -> tuple[Any, ...]:
    found = text.count(old)
    meter.spend(len(text) + len(new) * (found if count < 0 else min(found, count)))
    return (old, new, count)


def _join(meter: Meter, text: str, values: Iterable[Any]) -> tuple[Any, ...]:
    made = meter.counted(values)
    meter.spend(len(text) * len(made))
    return (made,)


def _split(meter: Meter, text: str, sep: str | None = None, maxsplit: int = -1) -> tuple[Any, ...]:
    pieces = len(text) // 2 if sep is None else text.count(sep)
    meter.spend(3 * ITEM * (pieces if maxsplit < 0 else min(pieces, maxsplit)))
    _scan(meter, text, sep or "")
    return (sep, maxsplit)


def _splitlines(meter: Meter, text: str, keepends: bool = False) -> tuple[Any, ...]:
    meter.spend(3 * ITEM * len(text.split("\n", 100_000)) + len(text))
    return (keepends,)


def _scan(meter: Meter, text: str, *args: Any) -> tuple[Any, ...]:
    """CPython strips, and searches from the right, in time len(text) × len(argument)."""
    if args and isinstance(args[0], str):
        meter.spend(len(text) * len(args[0]) // 64)
    return args


STRING_COSTS: Mapping[str, StringCost] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _pad),
    **dict.fromkeys(("split", "rsplit"), _split),
    **dict.fromkeys(("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition"), _scan),
    "replace": _replace,
    "join": _join,
    "splitlines": _splitlines,
}


# --- filters ----------------------------------------------------------------------------------------------------------

_CHEAP = ("attr", "count", "d", "default", "first", "length")
"""Constant work: their arguments are not paid for."""
_PLAIN = _words(
    "abs batch capitalize center dictsort e escape float forceescape format groupby indent int items join last list "
    "lower map max min random reject rejectattr replace reverse round safe select selectattr slice sort string sum "
    "title trim truncate unique upper urlencode wordcount"
)
# Not here: pprint, striptags, urlize, xmlattr, wordwrap and filesizeformat, which no chat template uses and whose work
# has no simple bound.


def bounded_filters(
    filters: Mapping[str, Callable[..., Any]], meter: Callable[[], Meter]
) -> dict[str, Callable[..., Any]]:
    """The filters a chat template may use, each paying for its arguments, its result and what grows in between."""
    bounded = {name: _cheap(filters[name], meter) for name in _CHEAP}
    return bounded | {name: _paid(name, filters[name], meter) for name in _PLAIN}


def _cheap(function: Callable[..., Any], meter: Callable[[], Meter]) -> Callable[..., Any]:
    @wraps(function)  # keeps Jinja's mark of what is passed first
    def bounded(*args: Any, **kwargs: Any) -> Any:
        meter().spend(1)
        return function(*args, **kwargs)

    return bounded


def _paid(name: str, function: Callable[..., Any], meter: Callable[[], Meter]) -> Callable[..., Any]:
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment
    extra = _FILTER_COSTS.get(name)

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        purse = meter()
        purse.spend_on(args[skip:])
        purse.spend_on(kwargs)
        if extra is not None:
            paid = extra(purse, *args[skip:], **kwargs)  # nosec B610  # Django's method of that name is meant
            args = (*args[:skip], *paid)
            kwargs = {}
        result = function(*args, **kwargs)
        if isinstance(result, GeneratorType):
            # Run it now: chains of lazy ones could nest deeper than the C stack. An iterator stays true even if
            # empty and has no length, as a generator.
            return iter(purse.counted(result))
        purse.spend_on(result)
        return result

    return bounded


def _filter_center(meter: Meter, value: Any, width: int = 80) -> tuple[Any, ...]:
    meter.spend(max(width, 0))
    return (value, width)


def _filter_indent(
    meter: Meter, s: str, width: int | str = 4, first: bool = False, blank: bool = False
) -> tuple[Any, ...]:
    meter.spend((len(str(s).splitlines()) + 1) * (len(width) if isinstance(width, str) else max(width, 0)))
    return (s, width, first, blank)


def _filter_replace(meter: Meter, s: Any, old: str, new: str, count: int | None = None) -> tuple[Any, ...]:
    _replace(meter, str(s), str(old), str(new), -1 if count is None else count)
    return (s, old, new, count)


def _filter_join(meter: Meter, value: Iterable[Any], d: Any = "", attribute: Any = None) -> tuple[Any, ...]:
    made = meter.counted(value)
    meter.spend(len(str(d)) * len(made))
    return (made, d, attribute)


def _filter_fill(meter: Meter, value: Iterable[Any], count: int, fill_with: Any = None) -> tuple[Any, ...]:
    meter.spend(ITEM * max(count, 0))  # slice makes this many lists, batch fills up to this many places
    return (value, count, fill_with)


def _filter_round(meter: Meter, value: Any, precision: int = 0, method: str = "common") -> tuple[Any, ...]:
    if not -100 <= precision <= 100:
        raise TemplateError(
            f"the chat template asks round for a precision of {precision}; the limit is 100", "messages"
        )
    return (value, precision, method)


def _filter_sum(meter: Meter, iterable: Iterable[Any], attribute: Any = None, start: float = 0) -> tuple[Any, ...]:
    if not isinstance(start, (int, float)):  # sums of lists take quadratic time
        raise TemplateError("the chat template asks sum to start with something that is not a number", "messages")
    return (iterable, attribute, start)


def _filter_trim(meter: Meter, value: Any, chars: str | None = None) -> tuple[Any, ...]:
    _scan(meter, str(value), chars or "")
    return (value, chars)


def _filter_format(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    if args and kwargs:
        raise TemplateError("the chat template gives format both positional and named values", "messages")
    return ("%s", percent_format(meter, str(value), kwargs or args))


_FILTER_COSTS: Mapping[str, Callable[..., Sequence[Any]]] = {
    "batch": _filter_fill,
    "center": _filter_center,
    "format": _filter_format,
    "indent": _filter_indent,
    "join": _filter_join,
    "replace": _filter_replace,
    "round": _filter_round,
    "slice": _filter_fill,
    "sum": _filter_sum,
    "trim": _filter_trim,
}
