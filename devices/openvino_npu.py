"""A decoder over OpenVINO's NPUW: one sequence, static shapes, on an NPU or, to test it without one, on the CPU.

The device holds the KV cache of a single sequence and gives none of it out. Each sequence keeps its token ids here,
which is what makes the rest simple: a token is computed when logits at or after it are asked for, a prompt therefore in
one call however it was fed, and what the device does not grant to keep of a prefix is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderLimits, DecoderOptions, DecoderSpec, Snapshot, Step
from devices.bound_sequence import BoundSequence
from devices.errors import EngineError, OutOfSequences
from devices.kv_types import choose_kv_type
from devices.openvino_npuw import open_npuw, static_shapes
from devices.sequence_decoder import SequenceDecoder
from devices.steps import check_batch, check_follows, snapshot_stop

_ONE_BY_ONE = 8
"""So many tokens are appended one after the other; more are read like a prompt, with what a kept prefix leaves out."""


class NpuSequence(BoundSequence["OpenVinoNpuDecoder"]):
    """Token ids. See :class:`devices.base.DecoderSequence`."""

    def __init__(self, decoder: OpenVinoNpuDecoder) -> None:
        super().__init__(decoder)
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens) if self.decoder else 0

    def crop(self, length: int) -> int:
        self._check_length(length)
        del self.tokens[length:]
        self.decoder.drop(length)
        return length

    def fork(self, length: int) -> NpuSequence:
        """OutOfSequences, always."""
        self._check_length(length)
        raise OutOfSequences(f"{self.decoder.device} holds one sequence, which takes the only place; close it first")

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot | None:
        snapshot_stop(start, stop, self.length)
        return None

    def restore(self, snapshot: Snapshot) -> None:
        """EngineError, always."""
        check_follows(snapshot, self.length, self.decoder.limits)
        raise EngineError(f"{self.decoder.device} takes no snapshots; prefill instead")


class OpenVinoNpuDecoder(SequenceDecoder[NpuSequence]):
    """Implements :class:`devices.base.Decoder` for one sequence on an NPU; ``emulated``: on the CPU.

    Compiled for ``options.max_prompt`` tokens of prompt (1,024) and as many as 1,024 more of answer, within the model's
    context and ``options.kv_tokens``. Of the rows of logits asked for, all but the first take a call each. With rows=0
    nothing is computed yet, so errors come with the step that wants logits. Opening takes minutes on some NPUs, unless
    ``options.cache_dir`` has the compiled model. EngineError when OpenVINO cannot open ``spec.model``.
    """

    def __init__(self, spec: DecoderSpec, options: DecoderOptions, emulated: bool = False) -> None:
        device = "openvino:npu-emulated" if emulated else "openvino:npu"
        choose_kv_type(device, options.kv_type, ("float16",))
        shapes = static_shapes(spec, options)
        limits = DecoderLimits(
            max_context=shapes.max_context,
            max_prompt=shapes.max_prompt,
            max_sequences=1,
            prefill_chunk=options.prefill_chunk,
            kv_tokens=shapes.max_context,
            kv_bytes_per_token=sum(spec.heads_of_caches) * spec.head_dim * 2,
        )
        super().__init__(device, limits)
        self._vocab_size = spec.vocab_size
        self._held = 0
        """Tokens of the open sequence that are in the device's cache."""
        self._request = open_npuw(spec, options, shapes, self._stopwatch, emulated=emulated)

    def new_sequence(self, expected: int = 0) -> NpuSequence:
        self._check_place()
        sequence = NpuSequence(self)
        self._sequences.add(sequence)
        self._held = 0
        return sequence

    def forget(self, sequence: NpuSequence) -> None:
        """A sequence is closing."""
        self._sequences.discard(sequence)

    def drop(self, length: int) -> None:
        """The open sequence has only its first ``length`` tokens left."""
        self._held = min(self._held, length)

    # ---- running

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        self.check_open()
        sequences = [self._own(step) for step in batch]
        check_batch(batch, self._limits, self._vocab_size)
        return [self._run(sequence.tokens, step) for sequence, step in zip(sequences, batch, strict=True)]

    def _run(self, tokens: list[int], step: Step) -> NDArray[np.float32]:
        tokens += step.tokens.tolist()
        ends = range(len(tokens) - step.rows + 1, len(tokens) + 1)
        rows = [self._logits(tokens[:end]) for end in ends]
        return np.concatenate(rows) if rows else np.empty((0, self._vocab_size), np.float32)

    def _logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """(1, vocab) after the last of ``tokens``, of which fewer than all are held."""
        held, self._held = self._held, 0  # nothing is, should the device fail
        logits: NDArray[np.float32] | None = None
        readable = min(len(tokens), self._limits.max_prompt)
        if held == 0 or (readable > held and len(tokens) - held > _ONE_BY_ONE):
            logits = self._read(tokens[:readable], held)
            held = readable
        for place in range(held, len(tokens)):
            logits = self._request.append(tokens[place], place)
        assert logits is not None
        self._held = len(tokens)
        return logits

    def _read(self, tokens: list[int], held: int) -> NDArray[np.float32]:
        """Have ``tokens`` in the device's cache, which holds the first ``held`` of them and keeps what it can."""
        if held:
            kept = self._request.keep(held)
        else:
            self._request.reset()
            kept = 0
        return self._request.read(tokens[kept:], kept)

    # ---- the end

    def check_integrity(self) -> None:
        for sequence in self._sequences:
            if not self._held <= sequence.length <= self._limits.max_context:
                raise AssertionError(f"{self._held} of {sequence.length} tokens are held, of at most {self._limits}")
        if len(self._sequences) > 1:
            raise AssertionError(f"{len(self._sequences)} sequences are open on a device for one")

    def _release(self) -> None:
        self._request.close()
