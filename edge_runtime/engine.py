"""The engine's surface. (The loop behind it follows.)"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.request import Chunk, Usage
from edge_runtime.sampling import SamplingParams


class Generation(Protocol):
    """The answer to one request, as it is made. Iterate it from one thread or one event loop."""

    usage: Usage

    def __iter__(self) -> Generation: ...

    def __next__(self) -> Chunk: ...

    def __aiter__(self) -> Generation: ...

    async def __anext__(self) -> Chunk: ...

    def cancel(self) -> None:
        """End it within one step; the chunks end with ``finish_reason="cancelled"``. Idempotent, any thread."""

    def close(self) -> None:
        """Cancel it and drop what has not been read. Leaving a ``with`` block does this."""

    def __enter__(self) -> Generation: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class EngineProtocol(Protocol):
    """``Engine(decoder, tokenizer, *, vocab_size, max_queue=256, prefix_cache_bytes=None)``; the engine owns the decoder."""

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, eos_ids: Sequence[int] = ()) -> Generation:
        """InvalidRequest, PromptTooLong, Overloaded, EngineStopped. ``params`` should be ``resolved(model defaults)``."""

    def score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(len(ids)-1,) log p(ids[i+1] | ids[:i+1])."""

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(vocab,) after the last token."""

    def close(self) -> None:
        """End everything, close the decoder. Idempotent."""
