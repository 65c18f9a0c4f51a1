"""What layers cost by their shapes, as measured on the device that will run them, a single token at a time.

A few layers of the model itself are exported in each shape, with next to no vocabulary, and timed beside each other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from devices.base import Decoder, DecoderOptions, DecoderSpec, Step
from devices.registry import open_decoder
from edge_runtime.package import Weights
from edge_runtime.scratch import scratch_folder
from exporters.architecture import Architecture
from exporters.checkpoint import Checkpoint, CheckpointView
from exporters.compression.cut import Cut, CutCheckpoint, take_rows
from exporters.graphs import Engine, write_graph
from exporters.quantize import QuantizedCheckpoint
from exporters.weights import Tensor

DEVICES: dict[Engine, str] = {
    "onnx": "onnxruntime:cpu",
    "onnx-edge": "edge:cpu",
    "onnx-coreml": "onnxruntime:coreml",
    "onnx-cuda": "onnxruntime:cuda",
    "openvino": "openvino:cpu",
    "openvino-npu": "openvino:npu",
}
_LAYERS = 5
_VOCABULARY = 64
_PROMPT, _STEPS, _ROUNDS = 64, 24, 3
_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of a layer's neurons; costs in between are interpolated."""


class MeasuredCosts:
    """Implements :class:`exporters.compression.prune.Costs` in seconds a token. DeviceUnavailable, EngineError."""

    def __init__(self, source: Checkpoint, engine: Engine, weights: Weights) -> None:
        arch = source.architecture
        kv_heads, inner = arch.num_kv_heads, arch.intermediate_size
        count = min(_LAYERS, arch.num_layers)
        self._inner = inner
        with scratch_folder("edge-glm-latency-") as folder, _Timing(folder) as timing:
            one = timing.add(source, 1, kv_heads, inner, engine, weights)
            whole = timing.add(source, 1, kv_heads, inner, engine, weights, trimmed=False)
            groups = [timing.add(source, count, each, inner, engine, weights) for each in range(1, kv_heads + 1)]
            widths = [max(round(inner * share), 1) for share in _SHARES]
            shapes = [timing.add(source, count, kv_heads, each, engine, weights) for each in widths[:-1]]
            seconds = timing.run()
        full = seconds[groups[-1]]
        layer = (full - seconds[one]) / max(count - 1, 1)
        # only the sum of both halves and what each saves are ever looked at
        self._attention = [layer / 2 - (full - seconds[each]) / count for each in groups]
        self._widths = [float(each) for each in widths]
        self._mlp = [layer / 2 - (full - seconds[each]) / count for each in shapes] + [layer / 2]
        self._rest = seconds[whole] - layer

    def attention(self, kv_heads: int) -> float:
        return self._attention[kv_heads - 1]

    def mlp(self, neurons: int) -> float:
        slope = (self._mlp[1] - self._mlp[0]) / (self._widths[1] - self._widths[0])
        if neurons < self._widths[0]:
            return self._mlp[0] - slope * (self._widths[0] - neurons)
        return float(np.interp(neurons, self._widths, self._mlp))

    def rest(self) -> float:
        return self._rest


class _Timing:
    """Decoders that are timed in turns, so that what else the machine does meets all of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._decoders: list[Decoder] = []

    def add(
        self,
        source: Checkpoint,
        layers: int,
        kv_heads: int,
        inner: int,
        engine: Engine,
        weights: Weights,
        trimmed: bool = True,
    ) -> int:
        """Its number."""
        arch = source.architecture
        kept = range(layers)
        cut = Cut(
            frozenset(range(layers, arch.num_layers)),
            {index: tuple(range(kv_heads)) for index in kept},
            {index: np.arange(inner) for index in kept},
        )
        model = CutCheckpoint(_Mute(source) if trimmed else source, cut)
        number = len(self._decoders)
        folder, scratch = self._folder / str(number), self._folder / f"{number}.scratch"
        folder.mkdir()
        scratch.mkdir()
        runs_on, file = write_graph(QuantizedCheckpoint(model, weights), engine, weights, folder, scratch)
        made = model.architecture
        spec = DecoderSpec(
            engine=runs_on,
            model=folder / file,
            num_layers=made.num_layers,
            num_heads=made.num_heads,
            num_kv_heads=made.num_kv_heads,
            head_dim=made.head_dim,
            vocab_size=made.vocab_size,
            max_context=min(made.max_context, 1024),
            rope_switch=made.rope_switch,
        )
        self._decoders.append(open_decoder(spec, DEVICES[engine], DecoderOptions(max_sequences=1)))
        return number

    def run(self) -> Sequence[float]:
        """Seconds a token, of each: the least of some medians."""
        rounds = [[_decode(decoder) for decoder in self._decoders] for _ in range(_ROUNDS)]
        return [min(each) for each in zip(*rounds, strict=True)]

    def __enter__(self) -> _Timing:
        return self

    def __exit__(self, *_: object) -> None:
        for decoder in self._decoders:
            decoder.close()


def _decode(decoder: Decoder) -> float:
    sequence = decoder.new_sequence(_PROMPT + _STEPS)
    token = np.ones(1, np.int64)
    decoder.forward([Step(sequence, np.ones(_PROMPT, np.int64))])
    taken = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        decoder.forward([Step(sequence, token)])
        taken.append(time.perf_counter() - start)
    sequence.close()
    return median(taken)


class _Mute(CheckpointView):
    """``base`` with a few tokens only."""

    @property
    def architecture(self) -> Architecture:
        return replace(self._base.architecture, vocab_size=_VOCABULARY)

    def tensor(self, name: str) -> Tensor:
        tensor = self._base.tensor(name)
        return take_rows(tensor, np.arange(_VOCABULARY)) if name in ("embed", "head") else tensor
