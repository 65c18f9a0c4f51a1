"""A model on the best device that works: when one fails, it is put aside with its reason and the next takes over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engine import CLOSING_S, Engine, Successor
from edge_runtime.errors import DeviceUnavailable, EdgeError, EngineError, EngineStopped, PromptTooLong, StepTimeout
from edge_runtime.generation import Generation
from edge_runtime.loading import Loaded
from edge_runtime.placement import Placement
from edge_runtime.prompts import TierRequest
from edge_runtime.stuck import free, stuck

_log = logging.getLogger("edge_glm.devices")
_REASON = 200
"""Characters of an error that count as its reason; engines can tell long stories."""

T = TypeVar("T")
Place = Callable[[Mapping[str, str]], Placement]
"""Devices that are put aside, each with why → the best of the others. DeviceUnavailable: there is none."""
Load = Callable[[Placement, Successor, int], Loaded]
"""A placement, who takes over when it fails, and with how many others it shares the memory budget, itself included."""


class Failover:
    """The devices that are in use, best first, and which are not any more. Methods may be called from any thread.

    One is in use; two where the first takes long to open (it compiles the model) or takes shorter prompts than the
    other: the second answers until the first is open, and then what the first cannot take.
    """

    def __init__(self, place: Place, load: Load, first: Placement) -> None:
        """Load ``first``, or else what ``place`` gives next. One that compiles is loaded meanwhile.

        Raises what opening the only candidate does, else DeviceUnavailable with the reasons of all.
        """
        self._place = place
        self._load = load
        self._aside: dict[str, str] = {}
        self._lock = threading.Lock()
        """Guards the three below."""
        self._closed = False
        self._loaded: tuple[Loaded, ...] = ()
        self._opening: threading.Thread | None = None
        standby = self._after(first, "it is compiling the model") if first.device.compiles else None
        if standby is None:
            self._aside.pop(first.device.name, None)
            self._loaded = (self._open(first, 1),)
        else:
            self._loaded = (self._open(standby, 2),)
            self._opening = threading.Thread(target=self._open_first, args=(first,), name="edge-glm opening")
            self._opening.start()

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        """In use, best first; at least one."""
        return self._loaded

    @property
    def in_host_memory(self) -> list[Engine]:
        """Those in use whose KV cache is in this machine's memory, rather than in an accelerator's own."""
        return [each.engine for each in self._loaded if each.placement.device.name.endswith(":cpu")]

    @property
    def aside(self) -> Mapping[str, str]:
        """Devices that are not in use → why."""
        return MappingProxyType(self._aside)

    def start(self, request: TierRequest) -> Generation:
        """On the first device that can take it. PromptTooLong, by the one that takes the longest; Overloaded,
        EngineStopped, InvalidRequest."""
        return self._ask(lambda loaded: _start(loaded, request))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """See :meth:`edge_runtime.engine.Engine.logits`."""
        return self._ask(lambda loaded: _for_length(loaded, len(ids)).engine.logits(ids))

    def score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """See :meth:`edge_runtime.engine.Engine.score`."""
        return self._ask(lambda loaded: _for_length(loaded, len(ids)).engine.score(ids))

    def _ask(self, question: Callable[[tuple[Loaded, ...]], T]) -> T:
        """``question`` of those in use; again, if another takes over at that moment."""
        while True:
            asked = self._loaded
            try:
                return question(asked)
            except EngineStopped:
                if asked is self._loaded:
                    raise

    def switch(self, placement: Placement) -> None:
        """Open another variant on a device that is in use, in place of what it has: between requests, as
        :meth:`edge_runtime.engine.Engine.replace`. Returns when it is open.

        Raises what opening it does, and then what was open is open again; EngineStopped, if the device is not in use
        any more or fails meanwhile.
        """
        name, fresh = placement.device.name, placement
        with self._lock:
            in_use = [each for each in self._loaded if each.placement.device.name == name]
            if self._closed or not in_use:
                raise EngineStopped(f"{name} is not in use")
            sharing = 2 if len(self._loaded) > 1 or (self._opening is not None and self._opening.is_alive()) else 1
        (old,) = in_use
        errors: list[EdgeError] = []

        def open_successor() -> Engine:
            try:
                loaded = self._load(fresh, partial(self._succeed, fresh), sharing)
            except EdgeError as error:
                errors.append(error)
                loaded = self._load(old.placement, partial(self._succeed, old.placement), sharing)
            return self._put_in_place(old.placement, loaded)

        old.engine.replace(open_successor)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Close all. One that is being opened is waited for, since nothing can stop an engine there, but not for long:
        it is closed when it comes."""
        with self._lock:
            self._closed = True
        for loaded in self._loaded:
            loaded.engine.close()
        if self._opening is not None:
            self._opening.join(CLOSING_S)
            with self._lock:
                if self._opening.is_alive():
                    stuck(self._opening)

    # --- opening ------------------------------------------------------------------------------------------------------

    def _open(self, placement: Placement, sharing: int) -> Loaded:
        """The first that opens, beginning with ``placement``."""
        while True:
            try:
                return self._load(placement, partial(self._succeed, placement), sharing)
            except (EngineError, DeviceUnavailable) as error:
                following = self._after(placement, f"it does not open ({_short(error)})")
                if following is None:
                    if len(self._aside) == 1:
                        raise
                    reasons = "; ".join(f"{name}: {why}" for name, why in self._aside.items())
                    raise DeviceUnavailable(f"no device can be used: {reasons}") from error
                _log.warning("%s does not open, %s is used: %s", placement.device.name, following.device.name, error)
                placement = following

    def _open_first(self, placement: Placement) -> None:
        """On a thread of its own: open it beside the one that answers meanwhile, and put it before that."""
        try:
            self._open_beside(placement)
        finally:
            with self._lock:
                free(threading.current_thread())

    def _open_beside(self, placement: Placement) -> None:
        name = placement.device.name
        try:
            loaded = self._load(placement, partial(self._succeed, placement), 2)
        except EdgeError as error:
            self._aside[name] = f"it does not open ({_short(error)})"
            _log.warning("%s does not open, %s stays in use: %s", name, self._loaded[0].device, error)
            return
        with self._lock:
            closed = self._closed
            if not closed:
                del self._aside[name]
                self._loaded = (loaded, *self._loaded)
        if closed:
            loaded.engine.close()
        else:
            _log.info("%s is ready and answers from now on", name)

    def _after(self, placement: Placement, reason: str) -> Placement | None:
        """What comes after a device that is put aside now; None: nothing does."""
        self._aside[placement.device.name] = reason
        try:
            return self._place(self._aside)
        except EdgeError as error:
            _log.info("nothing takes the place of %s: %s", placement.device.name, error)
            return None

    # --- failing, on the thread of the engine that has failed ---------------------------------------------------------

    def _succeed(self, failed: Placement, error: EngineError) -> Callable[[], Engine] | None:
        """See :data:`edge_runtime.handover.Successor`."""
        name, reason = failed.device.name, f"it failed ({_short(error)})"
        with self._lock:
            others = tuple(each for each in self._loaded if each.placement is not failed)
            if others:
                self._aside[name] = reason
                self._loaded = others
        if others:
            _log.warning("%s failed, %s takes over: %s", name, others[0].device, error)
            return lambda: others[0].engine
        following = self._after(failed, reason)
        if following is None:
            if not isinstance(error, StepTimeout):  # it may recover, and there is nothing better
                del self._aside[name]
            return None
        _log.warning("%s failed, %s takes over: %s", name, following.device.name, error)
        return lambda: self._take_over(failed, following)

    def _take_over(self, failed: Placement, placement: Placement) -> Engine:
        return self._put_in_place(failed, self._open(placement, 1))

    def _put_in_place(self, old: Placement, loaded: Loaded) -> Engine:
        with self._lock:
            self._loaded = tuple(loaded if each.placement is old else each for each in self._loaded)
            closed = self._closed
        if closed:  # meanwhile
            loaded.engine.close()
        return loaded.engine


def _start(loaded: Sequence[Loaded], request: TierRequest) -> Generation:
    fits = [each.tier.fit(request) for each in loaded]
    for each, fit in zip(loaded, fits, strict=True):
        if fit.verdict(request.params)[0]:
            return each.tier.start(request)
    largest = max(fits, key=lambda fit: (fit.max_prompt, fit.max_context))
    raise PromptTooLong(largest.verdict(request.params)[1], largest.short_of)


def _for_length(loaded: Sequence[Loaded], tokens: int) -> Loaded:
    """The first that takes so many tokens, else the first."""
    return next((each for each in loaded if tokens <= each.max_prompt), loaded[0])


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _REASON else f"{text[: _REASON - 1]}…"
