"""The first rung as the others are asked: by prompts, and by texts to look at."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from devices.baseline import open_baseline
from edge_runtime.bench.ladder.job import Answered, Baseline
from edge_runtime.package import ArchitectureSummary
from edge_runtime.tokenizer import Tokenizer


class Graph(msgspec.Struct, frozen=True):
    """The plain graph on the disk."""

    architecture: ArchitectureSummary
    file: str


class BaselineModel:
    """Implements :class:`edge_runtime.evaluation.evaluate.Model`. DeviceUnavailable, EngineError."""

    def __init__(self, graph: Graph, engine: Baseline, tokenizer: Tokenizer, threads: int | None) -> None:
        self.name = f"unfused fp32 on {engine}"
        self.tokenizer = tokenizer
        self.chunk = self.longest = graph.architecture.max_context
        self._baseline = open_baseline(graph.architecture.spec("onnxruntime", Path(graph.file)), engine, threads)

    @cached_property
    def vocabulary(self) -> Sequence[str | None]:
        return [self.tokenizer.id_to_token(token) for token in range(self.tokenizer.vocab_size)]

    def logits(self, ids: NDArray[np.int64], step: int) -> Iterator[NDArray[np.float32]]:
        self._baseline.begin(len(ids))
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            yield self._baseline.forward(part, rows=len(part))

    def greedy(self, prompt: NDArray[np.int64], count: int) -> list[int]:
        return self.answer(prompt, count).tokens

    def answer(self, prompt: NDArray[np.int64], count: int) -> Answered:
        """``count`` tokens, the likeliest each."""
        started = time.perf_counter()
        self._baseline.begin(len(prompt) + count)
        tokens = [int(self._baseline.forward(prompt)[0].argmax())]
        first = time.perf_counter() - started
        while len(tokens) < count:
            tokens.append(int(self._baseline.forward(np.array(tokens[-1:], np.int64))[0].argmax()))
        return Answered(tokens, first, time.perf_counter() - started)

    def close(self) -> None:
        self._baseline.close()
