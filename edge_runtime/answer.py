"""Answers as a Python caller gets them: whole, or a stream of chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.generation import Generation
from edge_runtime.request import Chunk, FinishReason, TokenLogprob, Usage
from edge_runtime.route import Route
from edge_runtime.tools.pieces import add_call, whole
from edge_runtime.tracing.trace import Lane, Trace


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called."""

    id: str
    """For the message of role ``tool`` that answers it."""
    name: str
    arguments: str
    """JSON."""


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    """As sampled, the token that ended it included."""
    finish_reason: FinishReason
    usage: Usage
    tier: str
    """Where it was made."""
    route: Route
    """Why there."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token, if asked for."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What it calls, in place of text or behind it."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """Seconds by what was done (:data:`edge_runtime.tracing.trace.Part`), and their ``total`` in wall time."""


class ChunkStream:
    """Chunks of one generation; failures raise. Closing or forgetting it cancels the generation."""

    def __init__(self, generation: Generation, lane: Lane | None = None) -> None:
        """``lane``: of a trace that ends with the stream."""
        self._generation = generation
        self._lane = lane

    @property
    def route(self) -> Route:
        """Who answers, and why; known with the first chunk."""
        return self._generation.route

    def __iter__(self) -> ChunkStream:
        return self

    def __next__(self) -> Chunk:
        lane = self._lane
        if lane is None:
            return next(self._generation).checked()
        lane.pause()  # what the reader has done between two chunks counts, too
        try:
            chunk = next(self._generation).checked()
        except BaseException:
            lane.trace.finish()
            raise
        lane.delivered()
        return chunk

    @property
    def trace(self) -> Trace | None:
        """Its spans; None: the caller has a trace of its own."""
        return None if self._lane is None else self._lane.trace

    @property
    def timing(self) -> Mapping[str, float]:
        """So far; see :attr:`Completion.timing`."""
        if self._lane is None:
            return {}
        trace = self._lane.trace
        return {**{part: each / 1e9 for part, each in trace.parts().items()}, "total": trace.wall / 1e9}

    def close(self) -> None:
        if self._lane is not None:
            self._lane.trace.finish()
        self._generation.close()


def joined(chunks: Iterator[Chunk], route: Route, timing: Callable[[], Mapping[str, float]] = dict) -> Completion:
    """``timing``: asked once all chunks have come."""
    parts = list(chunks)
    last = parts[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    return Completion(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        tier=last.tier,
        route=route,
        logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
        tool_calls=tuple(_calls(parts)),
        timing=timing(),
    )


def _calls(parts: Sequence[Chunk]) -> Iterator[ToolCall]:
    calls: list[dict[str, Any]] = []
    for part in parts:
        for piece in (part.extra or {}).get("tool_calls", ()):
            add_call(calls, piece)
    for call in whole(calls):
        function = call["function"]
        yield ToolCall(call.get("id") or "", function["name"], function.get("arguments") or "")
