"""The real SmolLM2 keeps its answers at 4 bits: against Transformers in fp32 on the same dequantized weights.

The reference is made by tests/tools/make_smollm2_reference.py; nothing of this project took part in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from devices import Decoder, DecoderOptions, Step, open_decoder
from edge_runtime.package import Package
from exporters.export import export
from exporters.formats import open_checkpoint
from tests.conftest import FIXTURES


@pytest.fixture(scope="module")
def package(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("fidelity") / "smollm2"
    export(open_checkpoint(smollm2_gguf), folder, engines=("onnx", "openvino"), weights="int4")
    return Package.open(folder)


@pytest.fixture(scope="module")
def reference() -> dict[str, NDArray[np.generic]]:
    with np.load(FIXTURES / "smollm2" / "reference.npz") as arrays:
        return dict(arrays)


@pytest.fixture(params=[("onnx-int4", "onnxruntime:cpu"), ("openvino-int4", "openvino:cpu")], ids=lambda p: p[1])
def decoder(request: pytest.FixtureRequest, package: Package) -> Iterator[Decoder]:
    variant, device = request.param
    opened = open_decoder(package.spec(variant), device, DecoderOptions(max_sequences=2))
    yield opened
    opened.close()


def all_logits(decoder: Decoder, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """(len(ids), vocab)."""
    sequence = decoder.new_sequence(len(ids))
    chunk = decoder.limits.prefill_chunk
    parts = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
    rows = [decoder.forward([Step(sequence, part, rows=len(part))])[0] for part in parts]
    sequence.close()
    return np.concatenate(rows)


def test_four_bit_answers_are_those_of_fp32(decoder: Decoder, reference: dict[str, NDArray[np.generic]]) -> None:
    ids = reference["ids"].astype(np.int64)
    logits = all_logits(decoder, ids).astype(np.float64)
    peak = logits.max(-1, keepdims=True)
    log_sum = (peak + np.log(np.exp(logits - peak).sum(-1, keepdims=True)))[:-1, 0]
    score = logits[np.arange(len(ids) - 1), ids[1:]] - log_sum
    nll, expected = -score.mean(), -reference["score"].mean(dtype=np.float64)
    agreement = (logits.argmax(-1) == reference["top1"]).mean()
    print(f"{decoder.device}: NLL {nll:.4f} against {expected:.4f} ({nll / expected - 1:+.3%}), top-1 {agreement:.2%}")
    assert abs(nll / expected - 1) <= 0.005
    assert agreement >= 0.97
