"""Finding stages (entry points ``edge_glm.stages``), and calling them so that none can do harm."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from edge_runtime.detokenizer import Decoding, TokenText
from edge_runtime.errors import PolicyError
from edge_runtime.facts import Facts
from edge_runtime.stages.protocols import METHODS, Conversation, TextFilter

GROUP = "edge_glm.stages"
DEFAULT = ("prompt-signals", "plain-checks")
"""On, where the policy names none."""
_log = logging.getLogger("edge_glm.stages")
T = TypeVar("T")


def installed() -> dict[str, EntryPoint]:
    """Name → where it comes from, as it is now."""
    importlib.invalidate_caches()
    return {each.name: each for each in entry_points(group=GROUP)}


class Stages:
    """Those that are on, in order. Built anew with each version of the policy; requests keep those they began with.

    PolicyError for a name that nothing installed has.
    """

    def __init__(self, names: Sequence[str] | None = None, found: Mapping[str, EntryPoint] | None = None) -> None:
        found = installed() if found is None else found
        self.aside: dict[str, str] = {}
        """Stages that are not used any more → why."""
        self._stages: dict[str, Any] = {}
        for name in DEFAULT if names is None else names:
            if name not in found:
                raise PolicyError(f"there is no stage {name}; installed: {', '.join(sorted(found)) or 'none'}")
            try:
                stage = _load(found[name])()
            except Exception as error:
                self._put_aside(name, error)
                continue
            if not any(hasattr(stage, method) for method in METHODS):
                raise PolicyError(f"{found[name].value} is no stage: it has none of the methods {', '.join(METHODS)}")
            self._stages[name] = stage

    @property
    def names(self) -> tuple[str, ...]:
        """Those in use."""
        return tuple(name for name in self._stages if name not in self.aside)

    def signals(self, facts: Facts) -> dict[str, float]:
        """All together; of two of one name the later counts."""
        said: dict[str, float] = {}
        for name, signals in self._having("signals"):
            nothing: dict[str, float] = {}
            said |= self._call(name, partial(_numbers, signals, facts), nothing)
        return said

    def problem(self, text: str, tokens: Sequence[int], ended: bool, facts: Facts) -> str | None:
        """The first that one finds."""
        for name, problem in self._having("problem"):
            found = self._call(name, partial(problem, text, tokens, ended, facts), None)
            if found is not None:
                return str(found)
        return None

    def shorten(self, messages: Conversation, count: Callable[[Conversation], int], room: int) -> Conversation | None:
        """By the first that makes it fit; None: none does."""
        for name, shorten in self._having("shorten"):
            shorter: Conversation | None = self._call(name, partial(shorten, messages, count, room), None)
            if shorter and count(shorter) <= room:
                return shorter
        return None

    def output(self, facts: Facts) -> TextFilter | None:
        """All filters, one after the other; None: there are none."""
        filters: list[tuple[str, TextFilter]] = []
        for name, output in self._having("output"):
            made: TextFilter | None = self._call(name, partial(output, facts), None)
            if made is not None:
                filters.append((name, made))
        return _Filters(filters, self._put_aside) if filters else None

    @property
    def filters(self) -> bool:
        """:meth:`output` gives some."""
        return bool(self._having("output"))

    @property
    def decoding(self) -> Decoding | None:
        """The last one's; None: the tokenizer's own."""
        found = self._having("decoding")
        if not found:
            return None
        name, decoding = found[-1]

        def guarded(decode: Callable[[Sequence[int]], str], otherwise: TokenText) -> TokenText:
            made: TokenText = self._call(name, partial(decoding, decode), otherwise)
            return _GuardedText(made, otherwise, partial(self._put_aside, name))

        return guarded

    def _having(self, method: str) -> list[tuple[str, Callable[..., Any]]]:
        """The stages in use that have it."""
        return [
            (name, getattr(self._stages[name], method)) for name in self.names if hasattr(self._stages[name], method)
        ]

    def _call(self, name: str, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except Exception as error:
            self._put_aside(name, error)
            return otherwise

    def _put_aside(self, name: str, error: Exception) -> None:
        self.aside[name] = f"{type(error).__name__}: {error}"
        _log.error(
            "the stage %s is put aside until the policy is read again: %s", name, self.aside[name], exc_info=error
        )


class _GuardedText:
    """Where it raises, the tokenizer's own way goes on from that token."""

    def __init__(self, made: TokenText, otherwise: TokenText, put_aside: Callable[[Exception], None]) -> None:
        self._made = made
        self._otherwise = otherwise
        self._put_aside = put_aside

    def add(self, token: int, /) -> str:
        try:
            return self._made.add(token)
        except Exception as error:
            if self._made is self._otherwise:
                raise
            self._put_aside(error)
            self._made = self._otherwise
            return self._made.add(token)

    def flush(self) -> str:
        try:
            return self._made.flush()
        except Exception as error:
            if self._made is self._otherwise:
                raise
            self._put_aside(error)
            return ""


class _Filters:
    """Several as one. One that raises is left out from there on; what it held is lost with it, what comes is not."""

    def __init__(self, filters: list[tuple[str, TextFilter]], put_aside: Callable[[str, Exception], None]) -> None:
        self._filters = filters
        self._put_aside = put_aside

    def add(self, text: str) -> str:
        for each in list(self._filters):
            text = self._guarded(each, partial(each[1].add, text), text)
        return text

    def flush(self) -> str:
        rest = ""
        for each in list(self._filters):
            rest = self._guarded(each, partial(_last, each[1], rest), rest)
        return rest

    def _guarded(self, each: tuple[str, TextFilter], call: Callable[[], str], otherwise: str) -> str:
        try:
            return call()
        except Exception as error:
            self._put_aside(each[0], error)
            self._filters.remove(each)
            return otherwise


def _last(filter: TextFilter, text: str) -> str:
    return (filter.add(text) if text else "") + filter.flush()


_LOADED: dict[str, float] = {}
"""Module of a stage → when its file was changed last, as far as it is loaded."""


def _load(found: EntryPoint) -> Callable[[], Any]:
    """What the entry point names, read again if its file has changed since."""
    module = sys.modules.get(found.module)
    source = None if module is None else getattr(module, "__file__", None)
    if module is not None and source is not None and Path(source).is_file():
        changed = Path(source).stat().st_mtime
        if _LOADED.setdefault(found.module, changed) != changed:
            importlib.reload(module)
            _LOADED[found.module] = changed
    made: Callable[[], Any] = found.load()
    return made


def _numbers(signals: Callable[[Facts], Mapping[str, float]], facts: Facts) -> dict[str, float]:
    return {str(name): float(value) for name, value in signals(facts).items()}
