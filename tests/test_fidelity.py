"""The real SmolLM2 keeps its answers at 4 bits: against Transformers in fp32 on the same dequantized weights.

The reference is made by tests/tools/make_smollm2_reference.py; nothing of this project took part in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from devices import Decoder, DecoderOptions, open_decoder
from edge_runtime.package import Package
from exporters.export import export
from exporters.formats import open_checkpoint
from tests.bench.fidelity import measure_loss


@pytest.fixture(scope="module")
def package(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("fidelity") / "smollm2"
    export(open_checkpoint(smollm2_gguf), folder, engines=("onnx", "openvino"), weights="int4")
    return Package.open(folder)


@pytest.fixture(params=["onnxruntime", "openvino"])
def decoder(request: pytest.FixtureRequest, package: Package) -> Iterator[Decoder]:
    variant = package.variant(request.param, "int4")
    assert variant is not None
    opened = open_decoder(package.spec(variant), f"{request.param}:cpu", DecoderOptions(max_sequences=2))
    yield opened
    opened.close()


def test_four_bit_answers_are_those_of_fp32(decoder: Decoder) -> None:
    loss = measure_loss(decoder)
    print(f"{decoder.device}: NLL {loss.nll:.4f} ({loss.excess:+.3%}), top-1 {loss.top1:.2%}")
    assert abs(loss.excess) <= 0.005
    assert loss.top1 >= 0.97
