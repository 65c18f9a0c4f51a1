"""The interface that everything hangs on: a decoder runs batches of steps over sequences it owns.

A ``Decoder`` holds one model on one device together with its KV cache. A ``DecoderSequence`` is the
KV cache of one token sequence; it lives in its decoder and dies with it. Prefill, decode and the
verification of drafted tokens are all the same call, :meth:`Decoder.forward`.

Not thread safe: one thread owns a decoder and all its sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from devices.kv_types import KVType, KVWish

Engine = Literal[
    "onnxruntime", "onnxruntime-coreml", "onnxruntime-cuda", "onnxruntime-edge", "openvino", "openvino-npu"
]
"""What a graph is made for. ONNX Runtime's CPU provider, whose graph WebGPU's and OpenVINO's plugins take too, its CUDA
provider and our own operators on the CPU (``edge``) take different ones; CoreML takes static shapes, and OpenVINO's NPU
weights in layouts of its own."""


@dataclass(frozen=True)
class DecoderSpec:
    """What a device must know of a model variant to open it. Paths are absolute."""

    engine: Engine
    model: Path
    """The graph: ``model.onnx`` (weights beside it as external data) or ``openvino_model.xml``."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    """Tokens a sequence can hold: the positions the model was made for."""
    sliding_windows: tuple[int | None, ...] = ()
    """Per layer: attention reaches this many tokens back (itself included), None: all. Empty: all None."""
    rope_switch: int | None = None
    """Longrope (Phi-3): sequences expected to grow longer than this use the long rotary factors, chosen
    for the whole sequence. None: the model has one set of factors."""
    kv_heads: tuple[int, ...] = ()
    """Per layer; empty: ``num_kv_heads`` in all, which is the most otherwise."""

    @property
    def heads_of_caches(self) -> tuple[int, ...]:
        """Of keys and values, layer by layer: (k0, v0, k1, v1, …)."""
        heads = self.kv_heads or (self.num_kv_heads,) * self.num_layers
        return tuple(count for count in heads for _ in range(2))


@dataclass(frozen=True)
class DecoderOptions:
    """How to open a model. ``None`` lets the device choose."""

    max_sequences: int = 16
    prefill_chunk: int = 256
    """Tokens of a prompt run at once. 512 are no faster and take 19 MB more, 128 are 3 % slower (tests/bench/NOTES.md);
    others' tokens wait for one chunk."""
    kv_tokens: int | None = None
    """Tokens of KV cache over all sequences. None: one full context, at least."""
    max_prompt: int | None = None
    """Tokens of the longest prompt. Only devices with static shapes care, which are compiled for it."""
    threads: int | None = None
    kv_type: KVWish | None = None
    """Of the KV cache. Devices have their own choice of types; DeviceUnavailable for others. ``auto``: each sequence
    its own, on devices that can (:class:`KVChoosing`), else as None."""
    batch_invariant: bool = False
    """A sequence's logits do not depend, to the last bit, on what else is in the batch. Engines multiply a single
    token by another kernel than several, which rounds differently, and int8 activations amplify that; so a token
    that is alone runs beside an idle one, at a cost (about a third more time for a single stream). Where
    :attr:`DecoderLimits.invariant` is true that is so anyway, at no cost."""
    cache_dir: Path | None = None
    """Where an engine may keep compiled models. None: it keeps none."""
    profile: Path | None = None
    """A folder for what the engine writes while its operators' times are counted, which makes calls slower; the caller
    removes it. None: nothing is counted. Devices without counters do not care (:class:`devices.profiling.Profiled`)."""
    properties: dict[str, str] = field(default_factory=dict)
    """Further engine properties, passed as they are (OpenVINO properties, ORT session config entries)."""


class KVChoice(NamedTuple):
    """A type that a sequence's KV cache may have."""

    kv_type: KVType
    bytes_per_token: int


@dataclass(frozen=True)
class DecoderLimits:
    """Hard limits of an open decoder."""

    max_context: int
    """Tokens one sequence can hold."""
    max_prompt: int
    """Tokens of the longest prompt (smaller than ``max_context`` on static-shape devices)."""
    max_sequences: int
    """Sequences open at once; also the most steps of one ``forward``."""
    prefill_chunk: int
    """Tokens the device takes best in one prefill step; a step may be at most this long."""
    kv_tokens: int
    """Tokens of KV cache over all sequences; of the first type, where there is a choice."""
    kv_bytes_per_token: int
    kv_block: int = 1
    """Cached tokens keep their values only in whole blocks of so many: where keys are quantized together over
    several tokens, a partly filled block holds other values than the same tokens in a full one."""
    rope_switch: int | None = None
    """See :attr:`DecoderSpec.rope_switch`. A sequence about to pass it must be prefilled anew with a
    larger ``expected``."""
    kv_choices: tuple[KVChoice, ...] = ()
    """Types of KV cache of which each sequence has its own, the most faithful and largest first. Empty: all sequences
    have the same."""
    invariant: bool = False
    """A token's logits do not depend, to the last bit, on what else is in its step or in the batch, whether or not
    :attr:`DecoderOptions.batch_invariant` asks for it."""

    @property
    def kv_bytes(self) -> int:
        """Of KV cache over all sequences."""
        return self.kv_tokens * self.kv_bytes_per_token

    def bytes_per_token(self, kv_type: KVType | None) -> int:
        """Of a sequence of that type; None: of the first."""
        return dict(self.kv_choices).get(kv_type, self.kv_bytes_per_token) if kv_type else self.kv_bytes_per_token

    @property
    def longest(self) -> int:
        """Tokens that a sequence which has all the KV cache can hold."""
        smallest = min((each.bytes_per_token for each in self.kv_choices), default=self.kv_bytes_per_token)
        return min(self.max_context, self.kv_bytes // smallest)


SNAPSHOT_STEP = 256
"""Snapshots begin at a multiple of so many tokens, which the block size of every device divides."""


@dataclass(frozen=True)
class Snapshot:
    """The KV cache of a sequence, or of some of its tokens, outside its device: a key and a value array per layer.

    Valid only for a decoder over the same files, engine and KV precision: the caller's fingerprint.
    """

    length: int
    """Tokens."""
    arrays: tuple[NDArray[np.generic], ...]
    """Keys and values, layer by layer (k0, v0, k1, v1, …), in the device's own layout and type."""
    start: int = 0
    """Tokens of the sequence before these."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class DecoderSequence(Protocol):
    """The KV cache of one token sequence. Using it after :meth:`close` raises :class:`~devices.errors.DeviceError`."""

    @property
    def length(self) -> int:
        """Tokens held."""

    @property
    def nbytes(self) -> int:
        """Bytes of KV cache this sequence holds (blocks shared with others are counted in each)."""

    def crop(self, length: int) -> int:
        """Drop the newest tokens so that ``length`` stay; returns the length really kept, 0..length.

        A device may grant less than asked; the caller feeds the difference again. ValueError if
        ``length`` is negative or above the present length.
        """

    def fork(self, length: int) -> DecoderSequence:
        """A new sequence with the first ``length`` tokens; both go on independently.

        ValueError as for ``crop``; OutOfSequences when no place is left; OutOfKVCache.
        """

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot | None:
        """A copy of the cache of tokens ``start`` to ``stop`` (None: the length); None if the device has no such thing.

        ValueError unless ``start`` is a multiple of :data:`SNAPSHOT_STEP` and 0 ≤ start ≤ stop ≤ length.
        """

    def restore(self, snapshot: Snapshot) -> None:
        """Append a snapshot. All or nothing: EngineError if it does not follow on the tokens held or is not of this
        model; ContextOverflow, OutOfKVCache.
        """

    def close(self) -> None:
        """Give the KV cache back. Idempotent."""


class Step(NamedTuple):
    """One sequence's part in a batch."""

    sequence: DecoderSequence
    tokens: NDArray[np.int64]
    """(n,), n ≥ 1: appended to the sequence."""
    rows: int = 1
    """Logits of the last ``rows`` tokens are returned; 0 ≤ rows ≤ n. 0: none (a chunk in mid-prompt)."""


Forward = Callable[[Sequence[Step]], list[NDArray[np.float32]]]
"""As :meth:`Decoder.forward`."""


class Decoder(Protocol):
    """A model on a device. Use :func:`devices.open_decoder` to get one."""

    @property
    def limits(self) -> DecoderLimits: ...

    @property
    def device(self) -> str:
        """``engine:device`` as really opened, e.g. ``openvino:cpu``."""

    @property
    def engine_seconds(self) -> float:
        """Time spent inside the engine's inference calls so far; the rest of :meth:`forward` is our own."""

    def new_sequence(self, expected: int = 0) -> DecoderSequence:
        """An empty sequence, expected to grow to ``expected`` tokens (only longrope models care).

        OutOfSequences when ``max_sequences`` are open.
        """

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        """Append each step's tokens to its sequence and return one (rows, vocab_size) array per step.

        Steps may have any mixture of lengths; each sequence appears at most once. The arrays belong to
        the caller. All or nothing: on ContextOverflow, OutOfKVCache or ValueError (empty step, step
        longer than ``prefill_chunk``, token id outside the vocabulary, sequence twice) nothing was run. After
        EngineError the sequences of the batch are undefined and must be closed.
        """

    def check_integrity(self) -> None:
        """Raise AssertionError if the bookkeeping of sequences and KV cache contradicts itself."""

    def close(self) -> None:
        """Free the model and the KV cache; open sequences become invalid. Idempotent."""


@runtime_checkable
class Trimming(Decoder, Protocol):
    """A decoder that holds memory beyond what its sequences need, once they have needed more."""

    def trim(self) -> None:
        """Give that memory back to the system. Takes milliseconds, and its pages must be zeroed when they are needed
        again: for when there is nothing to do."""


@runtime_checkable
class KVChoosing(Decoder, Protocol):
    """A decoder with ``limits.kv_choices``."""

    def new_sequence_in(self, kv_type: KVType, expected: int = 0) -> DecoderSequence:
        """As :meth:`Decoder.new_sequence`, which takes the first choice; a fork has the type of its origin.

        ValueError for a type that is no choice.
        """
