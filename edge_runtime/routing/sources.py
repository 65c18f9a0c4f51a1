"""Answers that have begun: chunks that were read to see how it begins, and the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

from edge_runtime.generation import Generation
from edge_runtime.request import Chunk, Usage
from edge_runtime.tracing.trace import Lane, Part


class Source:
    """A tier's answer. Belongs to an event loop."""

    def __init__(self, tier: str, chunks: AsyncIterator[Chunk]) -> None:
        self.tier = tier
        self.held: list[Chunk] = []
        """Read, not passed on yet."""
        self.lane: Lane | None = None
        """Where its time is written down."""
        self._chunks = chunks
        self._reading: asyncio.Task[Chunk | None] | None = None
        """The next chunk, asked for when a wait ran out."""

    @property
    def text(self) -> str:
        """Of what is held."""
        return "".join(chunk.text for chunk in self.held)

    @property
    def tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.held)

    @property
    def ended(self) -> bool:
        return bool(self.held) and self.held[-1].finish_reason is not None

    @property
    def usage(self) -> Usage | None:
        """So far; None: the tier does not say."""
        return None

    async def hold(self, tokens: int, until: float) -> None:
        """Read at least one chunk, and on to so many ``tokens``, or ``until`` (of the loop's clock) with what is there.

        Raises what the tier does, a chunk's error too.
        """
        loop = asyncio.get_running_loop()
        while not self.ended and (not self.held or self.tokens < tokens):
            left = until - loop.time() if self.held else None
            if left is not None and left <= 0:
                return
            with suppress(TimeoutError):
                chunk = await self._next(left)
                if chunk is None:
                    return
                self.held.append(chunk.checked())

    async def rest(self) -> AsyncGenerator[Chunk]:
        """All chunks: those held, then the others."""
        held, self.held = self.held, []
        for chunk in held:
            yield chunk
        while (following := await self._next(None)) is not None:
            yield following

    async def _next(self, timeout: float | None) -> Chunk | None:
        """TimeoutError where it does not come in time; it is not lost then."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read())
        async with asyncio.timeout(timeout):  # wait_for may swallow a cancellation before Python 3.12
            chunk = await asyncio.shield(self._reading)
        self._reading = None
        return chunk

    async def _read(self) -> Chunk | None:
        return await anext(self._chunks, None)

    def mark(self, part: Part) -> None:
        """Since the last mark it was ``part``. Of a model here the engine says itself what it does."""
        if self.lane is not None:
            self.lane.mark(part)

    async def close(self) -> None:
        """End it and wait until nothing of it runs. Idempotent."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await reading
        close = getattr(self._chunks, "aclose", None)
        if close is not None:
            await close()


class LocalSource(Source):
    """A generation of the model here."""

    def __init__(self, tier: str, generation: Generation) -> None:
        super().__init__(tier, aiter(generation))
        self.generation = generation
        self._released = False

    @property
    def usage(self) -> Usage:
        return self.generation.usage

    def mark(self, part: Part) -> None:
        return

    async def release(self) -> Generation:
        """Leave the generation to somebody else: nothing of it is being read any more, and what was is held."""
        reading, self._reading = self._reading, None
        if reading is not None:
            if not reading.done():
                reading.cancel()  # it waits, and has taken nothing yet
            with suppress(asyncio.CancelledError):
                chunk = await reading
                self.held += [] if chunk is None else [chunk]
        self._released = True
        return self.generation

    async def close(self) -> None:
        if not self._released:
            self.generation.close()
            await super().close()


class Speeds:
    """How long each tier has taken lately: averages that forget (weight 0.3 for the newest)."""

    WEIGHT = 0.3
    FORGOTTEN_S = 300.0
    """After so long without an answer nothing is known of a tier, and it gets another chance."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[float, float]] = {}

    def ttft_ms(self, tier: str) -> float | None:
        """To the first token."""
        return self._get(tier, "ttft")

    def total_ms(self, tier: str) -> float | None:
        """To the end of an answer."""
        return self._get(tier, "total")

    def began(self, tier: str, seconds: float) -> None:
        self._add(tier, "ttft", seconds)

    def ended(self, tier: str, seconds: float) -> None:
        self._add(tier, "total", seconds)

    def _get(self, tier: str, what: str) -> float | None:
        known = self._known.get((tier, what))
        return None if known is None or time.monotonic() - known[1] > self.FORGOTTEN_S else known[0]

    def _add(self, tier: str, what: str, seconds: float) -> None:
        before, now = self._get(tier, what), 1e3 * seconds
        mean = now if before is None else before + self.WEIGHT * (now - before)
        self._known[tier, what] = mean, time.monotonic()
