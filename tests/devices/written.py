"""Devices that a test cannot do without, graphs written for them, and what they compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from devices import Decoder, DecoderSpec, Step
from devices.errors import DeviceUnavailable
from devices.registry import choose_device
from exporters.checkpoint import Checkpoint
from exporters.graphs import Engine, write_graph
from exporters.onnx_operators import WeightFormat
from exporters.quantize import QuantizedCheckpoint
from tests.decoder_spec import decoder_spec


def skip_without(device: str) -> None:
    try:
        choose_device(device)
    except DeviceUnavailable as error:
        pytest.skip(str(error))


def written(checkpoint: Checkpoint, folder: Path, engine: Engine, weights: WeightFormat) -> DecoderSpec:
    """A graph below ``folder``."""
    made = QuantizedCheckpoint(checkpoint, weights)
    runs_on, file = write_graph(made, engine, weights, folder / "model", folder)
    return decoder_spec(checkpoint.architecture, runs_on, folder / "model" / file)


def everything(decoder: Decoder, ids: NDArray[np.int64], sizes: tuple[int, ...] = ()) -> NDArray[np.float32]:
    """Logits of all ``ids``, fed in steps of ``sizes`` and then the rest."""
    sequence = decoder.new_sequence(len(ids))
    rows = []
    for size in (*sizes, len(ids)):
        part = ids[sequence.length : sequence.length + size]
        if len(part):
            rows += decoder.forward([Step(sequence, part, len(part))])
    sequence.close()
    return np.concatenate(rows)
