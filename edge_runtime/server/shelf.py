"""The models of a server: those that are open, and those that are opened when somebody asks for them.

One that was opened on demand is closed when nobody has used it for a while; where memory is short, the one that was not
used for longest goes first. Pinned ones stay. A model that answers is never closed under its answer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import anyio.to_thread

from edge_runtime.errors import BudgetError, ConfigError, EdgeError, EngineStopped, InvalidRequest, ModelNotFound
from edge_runtime.heartbeat import HEARTBEAT
from edge_runtime.model_facts import ModelFacts
from edge_runtime.server.served import ServedEmbedder, ServedModel
from edge_runtime.stuck import free, stuck
from edge_runtime.tracing.trace import enter, leave, span

KEEP_ALIVE = 300.0
"""Seconds that an unused model stays open, as with Ollama."""
FOREVER = float("inf")
_AWAKE_S = 0.01
"""By which a timer may come early; more, and the process has slept."""
_ENDING = "the model was still being opened when the server had to end"
_log = logging.getLogger("edge_glm.server")
M = TypeVar("M", ServedModel, ServedEmbedder)


@dataclass(frozen=True)
class Offer(Generic[M]):
    """A model that can be opened. ``open`` blocks; errors as :class:`edge_runtime.EdgeLLM` raises them."""

    open: Callable[[], M]
    facts: ModelFacts
    created: int


@dataclass(eq=False)
class Place(Generic[M]):
    """Of one model."""

    name: str
    model: M | None
    """None: it is not open."""
    offer: Offer[M] | None
    """None: once closed it stays closed."""
    keep_alive: float
    """Seconds; :data:`FOREVER`: it is pinned."""
    users: int = 0
    used: float = field(default_factory=HEARTBEAT.now)
    """When somebody last did."""
    leaving: bool = False
    """It is closed as soon as nobody uses it."""
    timer: asyncio.TimerHandle | None = None

    @property
    def facts(self) -> ModelFacts:
        if self.offer is not None:
            return self.offer.facts
        assert self.model is not None
        return self.model.facts

    @property
    def created(self) -> int:
        if self.offer is not None:
            return self.offer.created
        assert self.model is not None
        return self.model.created

    @property
    def expires_in(self) -> float:
        """Seconds until it is closed, if nobody uses it."""
        return self.keep_alive if self.users else max(self.keep_alive - (HEARTBEAT.now() - self.used), 0.0)


class Lease(Generic[M]):
    """A model that is open as long as this is held. An async context manager."""

    def __init__(self, shelf: Shelf, place: Place[M], model: M) -> None:
        self.model: M = model
        self._shelf = shelf
        self._place: Place[M] = place
        self._kept = False

    def keep(self) -> Callable[[], None]:
        """It is held beyond the ``with`` block, until what this returns is called."""
        self._kept = True
        return self._release

    def keep_alive(self, seconds: float | None) -> None:
        """How long it stays open once nobody uses it; None: as it was. Pinned ones stay pinned."""
        if seconds is not None and self._place.keep_alive != FOREVER:
            self._place.keep_alive = seconds

    async def __aenter__(self) -> Lease[M]:
        return self

    async def __aexit__(self, *exception: object) -> None:
        if not self._kept:
            self._release()

    def _release(self) -> None:
        self._shelf._release(self._place)


class _Opening(Generic[M]):
    """A model on its way, by a thread of its own."""

    def __init__(self, offer: Offer[M], loop: asyncio.AbstractEventLoop) -> None:
        self.model: asyncio.Future[M] = loop.create_future()
        self._offer: Offer[M] = offer
        self._loop = loop
        self._lock = threading.Lock()
        self._wanted = True
        self._thread = threading.Thread(target=self._run, name="edge-glm opening", daemon=True)
        self._thread.start()

    def give_up(self) -> None:
        """Should it come after all, it is closed."""
        with self._lock:
            self._wanted = False
            if self._thread.is_alive():
                stuck(self._thread)

    def _run(self) -> None:
        try:
            model = self._offer.open()
        except BaseException as error:
            self._tell(partial(self._failed, error))
        else:
            if not self._tell(partial(self._came, model)):
                model.close()
        with self._lock:
            free(self._thread)

    def _tell(self, what: Callable[[], None]) -> bool:
        """False: nobody wants to know."""
        with self._lock:
            if self._wanted:
                self._loop.call_soon_threadsafe(what)
            return self._wanted

    def _came(self, model: M) -> None:
        if self.model.cancelled() or not self._wanted:
            model.close()
        else:
            self.model.set_result(model)

    def _failed(self, error: BaseException) -> None:
        if not self.model.cancelled():
            self.model.set_exception(error)


class Shelf:
    """Of one event loop."""

    def __init__(
        self,
        models: ServedModel | Sequence[ServedModel],
        embedders: Sequence[ServedEmbedder] = (),
        offers: Mapping[str, Offer[ServedModel]] | None = None,
        embedder_offers: Mapping[str, Offer[ServedEmbedder]] | None = None,
        keep_alive: float = KEEP_ALIVE,
    ) -> None:
        """``models`` and ``embedders`` are open, and pinned. Offers come beside them, by name. ConfigError if there is
        no model or a name comes twice."""
        several = models if isinstance(models, Sequence) else [models]
        self._texts = {model.model_id: Place(model.model_id, model, None, FOREVER) for model in several}
        self._encoders = {model.model_id: Place(model.model_id, model, None, FOREVER) for model in embedders}
        names = [*(model.model_id for model in several), *(model.model_id for model in embedders)]
        names += [*(offers or {}), *(embedder_offers or {})]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"serve at least one model, each under its own name, not {names}")
        self._texts |= {name: Place(name, None, offer, keep_alive) for name, offer in (offers or {}).items()}
        others = embedder_offers or {}
        self._encoders |= {name: Place(name, None, offer, keep_alive) for name, offer in others.items()}
        self._opening = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._leave = HEARTBEAT.call(lambda: None)  # what the process sleeps through keeps nobody's model waiting
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what there is ------------------------------------------------------------------------------------------------

    @property
    def texts(self) -> Mapping[str, Place[ServedModel]]:
        """Models that make text, by name."""
        return self._texts

    @property
    def encoders(self) -> Mapping[str, Place[ServedEmbedder]]:
        """Models that make embeddings, by name."""
        return self._encoders

    @property
    def names(self) -> list[str]:
        return [*self._texts, *self._encoders]

    @property
    def places(self) -> list[Place[ServedModel] | Place[ServedEmbedder]]:
        return [*self._texts.values(), *self._encoders.values()]

    def place(self, name: str) -> Place[ServedModel] | Place[ServedEmbedder]:
        """ModelNotFound."""
        found = self._texts.get(name) or self._encoders.get(name)
        if found is None:
            raise self._unknown(name)
        return found

    def open_texts(self) -> Iterator[tuple[str, ServedModel]]:
        """Those that are open now."""
        for name, place in list(self._texts.items()):
            if place.model is not None:
                yield name, place.model

    def only_text(self) -> str:
        """The name of the only model that makes text. InvalidRequest where there are several."""
        if len(self._texts) != 1:
            raise InvalidRequest(f"which model? there is {', '.join(self._texts) or 'none that makes text'}", "model")
        return next(iter(self._texts))

    # --- use ----------------------------------------------------------------------------------------------------------

    async def text(self, name: str) -> Lease[ServedModel]:
        """A model that makes text, opened now if it is not. ModelNotFound names the models there are; InvalidRequest
        for an encoder; BudgetError, EngineError and so on if it does not open."""
        place = self._texts.get(name)
        if place is not None:
            return await self._take(place)
        if name in self._encoders:
            raise InvalidRequest(f"{name} makes embeddings, no text; use /v1/embeddings", "model")
        raise self._unknown(name)

    async def encoder(self, name: str) -> Lease[ServedEmbedder]:
        """A model that makes embeddings; as :meth:`text`."""
        place = self._encoders.get(name)
        if place is not None:
            return await self._take(place)
        if name in self._texts:
            raise InvalidRequest(f"{name} makes text, no embeddings: serve a sentence encoder beside it", "model")
        raise self._unknown(name)

    async def stop(self, name: str) -> bool:
        """Close it once nobody uses it; False: it is not open. ModelNotFound; InvalidRequest for one that could not be
        opened again."""
        place = self.place(name)
        if place.model is None:
            return False
        if place.offer is None:
            raise InvalidRequest(f"{name} was opened with the server, and stays", "model")
        place.leaving = True
        await self._close_unused(place)
        return True

    async def _take(self, place: Place[M]) -> Lease[M]:
        place.users += 1  # before anything is waited for, so that nobody closes it meanwhile
        try:
            if place.model is None or place.leaving:
                with span("load"):
                    async with self._opening:
                        await self._open(place)
        except BaseException:
            self._release(place)
            raise
        assert place.model is not None
        return Lease(self, place, place.model)

    async def _open(self, place: Place[M]) -> None:
        """One model after the other: what the first leaves is what the second can have."""
        place.leaving = False
        token = enter(None)  # what is opened here works for other requests, too
        try:
            await self._open_in_turn(place)
        finally:
            leave(token)

    async def _open_in_turn(self, place: Place[M]) -> None:
        while place.model is None:
            offer = place.offer
            assert offer is not None
            try:
                place.model = await self._opened(offer)
                _log.info("opened %s on %s", place.name, place.model.placement["device"])
            except BudgetError:
                idle = [
                    each
                    for each in self.places
                    if each.model is not None and not each.users and each.keep_alive != FOREVER
                ]
                if not idle:
                    raise
                await self._close(min(idle, key=lambda each: each.used))

    async def _opened(self, offer: Offer[M]) -> M:
        """On a thread that nobody waits for where the server ends: nothing can end it. EngineStopped then."""
        if self._stopping.is_set():
            raise EngineStopped(_ENDING)
        opening = _Opening(offer, asyncio.get_running_loop())
        stopping = asyncio.create_task(self._stopping.wait())
        either: list[asyncio.Future[Any]] = [opening.model, stopping]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            if not opening.model.done():
                opening.give_up()
        if not opening.model.done():
            raise EngineStopped(_ENDING)
        return await opening.model

    def stop_opening(self) -> None:
        """Whoever waits for a model to be opened is told that it will not be."""
        self._stopping.set()

    def _release(self, place: Place[M]) -> None:
        place.users -= 1
        place.used = HEARTBEAT.now()
        if place.users or place.model is None or place.offer is None:
            return
        if place.timer is not None:
            place.timer.cancel()
            place.timer = None
        seconds = 0.0 if place.leaving else place.keep_alive
        if seconds != FOREVER:
            place.timer = asyncio.get_running_loop().call_later(seconds, self._expire, place)

    def _expire(self, place: Place[M]) -> None:
        """Nobody may have used it since, and then it goes."""
        place.timer = None
        if place.users or place.model is None:
            return
        if place.expires_in > _AWAKE_S and not place.leaving:  # the process was not awake all the time
            place.timer = asyncio.get_running_loop().call_later(place.expires_in, self._expire, place)
            return
        task = asyncio.get_running_loop().create_task(self._close_unused(place))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close_unused(self, place: Place[ServedModel] | Place[ServedEmbedder] | Place[M]) -> None:
        async with self._opening:
            if not place.users and (place.leaving or place.expires_in <= _AWAKE_S):  # it was used while others opened
                await self._close(place)

    async def _close(self, place: Place[ServedModel] | Place[ServedEmbedder] | Place[M]) -> None:
        model, place.model, place.leaving = place.model, None, False
        if model is not None:
            _log.info("closing %s, which nobody uses", place.name)
            try:
                await anyio.to_thread.run_sync(model.close)
            except EdgeError as error:
                _log.warning("closing %s: %s", place.name, error)

    def close(self) -> None:
        """Close what was opened on demand. After the server has ended."""
        self._leave()
        for place in self.places:
            if place.model is not None and place.offer is not None:
                place.model.close()
                place.model = None

    def _unknown(self, name: str) -> ModelNotFound:
        return ModelNotFound(f"the model {name[:200]!r} is not served here; there is {', '.join(self.names)}")
