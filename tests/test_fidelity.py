"""The real SmolLM2 keeps its answers at 4 bits: against Transformers in fp32 on the same dequantized weights.

The reference is made by tests/tools/make_smollm2_reference.py; nothing of this project took part in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from devices import Decoder, DecoderOptions, open_decoder
from edge_runtime.package import Package
from tests.bench.fidelity import DEVICES, TEXTS, all_logits, measure_loss
from tests.conftest import usable


@pytest.fixture(params=DEVICES)
def decoder(request: pytest.FixtureRequest, smollm2_package: Package) -> Iterator[Decoder]:
    device = usable(request.param)
    variant = smollm2_package.variant(DEVICES[device], "int4")
    assert variant is not None
    opened = open_decoder(smollm2_package.spec(variant), device, DecoderOptions(max_sequences=2))
    yield opened
    opened.close()


@pytest.mark.parametrize("text", TEXTS)
def test_four_bit_answers_are_those_of_fp32(decoder: Decoder, text: str) -> None:
    loss = measure_loss(partial(all_logits, decoder), text)
    print(f"{decoder.device}, {text}: NLL {loss.nll:.4f} ({loss.excess:+.3%}), top-1 {loss.top1:.2%}")
    assert abs(loss.excess) <= 0.005
    assert loss.top1 >= 0.97
