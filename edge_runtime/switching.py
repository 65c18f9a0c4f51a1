"""Requests on a model whose variant may change between them: when somebody says so, or by the length of prompts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from edge_runtime.errors import EdgeError, EngineStopped, ModelNotFound, PromptTooLong
from edge_runtime.failover import Failover
from edge_runtime.generation import Generation
from edge_runtime.loading import Loaded
from edge_runtime.package import Package, WeightsWish
from edge_runtime.prompts import TierRequest
from edge_runtime.store import pick_variant
from edge_runtime.variants import Found, Variants

BACK_S = 60.0
"""After so long without a prompt that needs the room, an idle model goes back to the better variant."""
_log = logging.getLogger("edge_glm.variants")


class Switching:
    """Over the devices of a :class:`Failover`. Methods may be called from any thread.

    With ``auto`` weights a prompt for which the KV cache is too small waits until a variant that leaves it more room is
    open, if there is one. What runs ends first, on the variant it was begun with.
    """

    def __init__(
        self,
        failover: Failover,
        variants: Variants,
        auto: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failover = failover
        self._variants = variants
        self._auto = auto
        self._clock = clock
        self._lock = threading.Lock()
        """Held while a variant is chosen and opened, and while requests start that this could concern."""
        self._roomy_until: float | None = None
        """Until then a variant with more room stays; None: it is the best one."""

    @property
    def most_context(self) -> int | None:
        """Tokens for which room could be made at best; None: no more than is there."""
        return self._failover.loaded[0].placement.package.manifest.architecture.max_context if self._auto else None

    def start(self, request: TierRequest) -> Generation:
        """As :meth:`Failover.start`."""
        if self._roomy_until is None:
            try:
                return self._failover.start(request)
            except PromptTooLong:
                if not self._auto:
                    raise
        with self._lock:
            self._go_back(request)
            try:
                return self._failover.start(request)
            except PromptTooLong:
                if not self._make_room(request):
                    raise
            return self._failover.start(request)

    def switch(self, weights: WeightsWish) -> None:
        """Go on with these weights, on every device that is in use. Returns when they are open.

        ModelNotFound where the package has none for a device, and then nothing has changed; EngineError, BudgetError
        and so on where they do not open, and then those before are open again.
        """
        with self._lock:
            found = [(loaded, self._variant(loaded, weights)) for loaded in self._failover.loaded]
            self._auto, self._roomy_until = weights == "auto", None
            for loaded, (variant, reason) in found:
                if variant != loaded.placement.variant:
                    self._failover.switch(loaded.placement._replace(variant=variant, weights_reason=reason))

    def relieve(self, within: int | None) -> bool:
        """With ``auto`` weights under a budget, where nothing runs: go over to the best variant for which the process
        needs no more bytes; None: than its budget. False: something runs. (Without a budget a variant is measured
        against what is free beside the process, which says too little of one that takes another's place.)"""
        with self._lock:
            for loaded in self._failover.loaded if self._auto and self._variants.bounded else ():
                if not loaded.engine.idle:
                    return False
                best = self._variants.choose(loaded.placement.package, loaded.placement.device, within=within)
                if best is not None and best.variant != loaded.placement.variant:
                    self._open(loaded, best)
        return True

    def _variant(self, loaded: Loaded, weights: WeightsWish) -> Found:
        placement = loaded.placement
        package = Package.open(placement.package.folder)  # which may have got another since
        if weights == "auto":
            found = self._variants.choose(package, placement.device)
            return found or Found(placement.variant, "nothing fits better")
        variant = pick_variant(package, placement.device.engine, weights)
        if variant is None:
            there = ", ".join(each.name for each in package.manifest.variants)
            raise ModelNotFound(
                f"{package.name} has no {weights} variant for {placement.device.name}; it has: {there}; "
                "edge-glm pull adds one"
            )
        return Found(variant, f"{weights} weights, which were asked for")

    # --- by the length of prompts; the lock is held -------------------------------------------------------------------

    def _make_room(self, request: TierRequest) -> bool:
        """Open the best variant that has room for ``request``, on the first device where that is another."""
        for loaded in self._failover.loaded:
            found = self._room_for(loaded, request)
            if found is not None and self._open(loaded, found):
                self._roomy_until = self._clock() + BACK_S
                return True
        return False

    def _room_for(self, loaded: Loaded, request: TierRequest) -> Found | None:
        placement, fit = loaded.placement, loaded.tier.fit(request)
        tokens = fit.prompt_tokens + (request.params.max_tokens or 1)
        if tokens > placement.package.manifest.architecture.max_context:
            return None
        others = [each for each in placement.package.manifest.variants if each != placement.variant]
        found = self._variants.choose(placement.package, placement.device, tokens, others)
        if found is None:
            return None
        return found._replace(
            reason=f"{found.variant.weights} weights, for a prompt that needs room for {tokens} tokens"
        )

    def _go_back(self, request: TierRequest) -> None:
        """To the best variant, when nothing runs and nothing has needed the room for a while, this request neither."""
        if self._roomy_until is None:
            return
        loaded = self._failover.loaded[0]
        best = self._variants.choose(loaded.placement.package, loaded.placement.device)
        if best is None or best.variant == loaded.placement.variant:
            self._roomy_until = None
            return
        found = self._room_for(loaded, request)
        if found is None or found.variant != best.variant:
            self._roomy_until = self._clock() + BACK_S
        elif self._clock() >= self._roomy_until and loaded.engine.idle:
            self._open(loaded, best)
            self._roomy_until = None

    def _open(self, loaded: Loaded, found: Found) -> bool:
        variant, reason = found
        try:
            self._failover.switch(loaded.placement._replace(variant=variant, weights_reason=reason))
        except EngineStopped:  # another device has taken over, or it is the end
            return True
        except EdgeError as error:
            _log.warning("%s does not open, %s stays: %s", variant.name, loaded.placement.variant.name, error)
            return False
        _log.info("%s answers from now on, in place of %s", variant.name, loaded.placement.variant.name)
        return True
