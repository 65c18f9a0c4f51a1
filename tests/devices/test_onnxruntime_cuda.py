"""What only the CUDA decoder does, and every family on it. Without a GPU these are skipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from devices import Decoder, DecoderOptions, DecoderSpec, Step, open_decoder
from devices.errors import DeviceUnavailable
from devices.registry import choose_device
from exporters.checkpoint import Checkpoint
from exporters.graphs import Engine, write_graph
from exporters.onnx_operators import WeightFormat
from exporters.quantize import QuantizedCheckpoint
from exporters.safetensors_checkpoint import SafetensorsCheckpoint

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"


@pytest.fixture(scope="module", autouse=True)
def cuda() -> None:
    try:
        choose_device("cuda")
    except DeviceUnavailable as error:
        pytest.skip(str(error))


def make_spec(
    checkpoint: Checkpoint, folder: Path, weights: WeightFormat = "fp16", engine: Engine = "onnx-cuda"
) -> DecoderSpec:
    arch = checkpoint.architecture
    runs_on, file = write_graph(QuantizedCheckpoint(checkpoint, weights), engine, weights, folder / "model", folder)
    return DecoderSpec(
        engine=runs_on,
        model=folder / "model" / file,
        num_layers=arch.num_layers,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        vocab_size=arch.vocab_size,
        max_context=arch.max_context,
        rope_switch=arch.rope_switch,
    )


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


@pytest.mark.parametrize("family", sorted(path.name for path in FAMILIES.iterdir()))
def test_family_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    spec = make_spec(SafetensorsCheckpoint(FAMILIES / family), tmp_path)
    decoder = open_decoder(spec, "cuda", DecoderOptions(max_sequences=4, prefill_chunk=96, kv_tokens=512))
    # Transformers itself, computing in these types: 0.015 of the largest logit at most, 0.03 for Gemma in bfloat16
    tolerance = 0.06 if family.startswith("gemma") else 0.03
    with np.load(FAMILIES / family / "reference.npz") as arrays:
        ids = arrays["ids"].astype(np.int64)
        for length in (7, 24, 72):
            expected = arrays[f"logits_{length}"]
            for sizes in ((), (1, 3, 1, 17, 1, 1, 30)):
                error = np.abs(everything(decoder, ids[:length], sizes) - expected).max() / np.abs(expected).max()
                print(family, length, sizes, f"{error:.5f}")
                assert error < tolerance
    decoder.close()
