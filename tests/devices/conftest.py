"""Decoders of a tiny model: the fake one, our own kernels' over a stand-in for them, and one on each device here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.base import Decoder, DecoderOptions, DecoderSpec
from devices.errors import DeviceUnavailable
from devices.onnxruntime_edge import OnnxRuntimeEdgeDecoder
from devices.registry import choose_device, open_decoder
from exporters.checkpoint import Checkpoint
from exporters.graphs import Engine, write_graph
from exporters.onnx_operators import WeightFormat
from exporters.synthetic import SyntheticCheckpoint
from tests.decoder_spec import decoder_spec
from tests.devices.contract import CHUNK, CONTEXT, PROMPT, SEQUENCES, Open
from tests.devices.edge_session import SPEC, standing_in
from tests.exporters.random_checkpoint import ARCHITECTURE, RandomCheckpoint
from tests.fake_decoder import FakeDecoder

EXACT = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}
DEVICES: dict[str, Engine] = {
    "edge:cpu": "onnx-edge",
    "onnxruntime:cpu": "onnx",
    "onnxruntime:coreml-emulated": "onnx-coreml",
    "onnxruntime:cuda": "onnx-cuda",
    "onnxruntime:webgpu": "onnx",
    "onnxruntime:openvino": "onnx",
    "openvino:cpu": "openvino",
    "openvino:npu-emulated": "openvino-npu",
}
"""Device → the graph it runs."""
HALF = ("onnxruntime:cuda", "openvino:npu-emulated")
"""Devices that take no fp32 graphs."""
EVERYWHERE = ("onnxruntime:cpu", "openvino:cpu")
STAND_IN = "edge:stand-in"


def _spec(device: str, folder: Path) -> DecoderSpec:
    """A tiny model for ``device``."""
    deep = device == "openvino:npu-emulated"  # NPUW cuts models of many layers only, which is what is to be tested
    checkpoint: Checkpoint = RandomCheckpoint(ARCHITECTURE) if deep else SyntheticCheckpoint("tiny")
    arch = checkpoint.architecture
    weights: WeightFormat = "fp16" if device in HALF else "fp32"
    engine, file = write_graph(checkpoint, DEVICES[device], weights, folder / "model", folder)
    return decoder_spec(arch, engine, folder / "model" / file, CONTEXT)


@pytest.fixture(scope="module", params=["fake", STAND_IN, *DEVICES])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def opener(device: str, tmp_path_factory: pytest.TempPathFactory) -> Open:
    if device == "fake":
        return lambda kv_tokens: FakeDecoder(
            max_context=CONTEXT, max_sequences=SEQUENCES, prefill_chunk=CHUNK, kv_tokens=kv_tokens or 4 * CONTEXT
        )
    if device == STAND_IN:
        return _stand_in
    try:
        choose_device(device)
    except DeviceUnavailable as error:
        if device in EVERYWHERE:  # a contract that nobody runs is none
            raise
        pytest.skip(str(error))
    spec = _spec(device, tmp_path_factory.mktemp("tiny"))

    def opening(kv_tokens: int | None) -> Decoder:
        options = DecoderOptions(
            max_sequences=SEQUENCES,
            prefill_chunk=CHUNK,
            kv_tokens=kv_tokens or 4 * CONTEXT,
            max_prompt=PROMPT,
            threads=2,
            properties=EXACT if device == "openvino:cpu" else {},
        )
        return open_decoder(spec, device, options)

    return opening


def _stand_in(kv_tokens: int | None) -> Decoder:
    options = DecoderOptions(max_sequences=SEQUENCES, prefill_chunk=CHUNK, kv_tokens=kv_tokens or 4 * CONTEXT)
    with standing_in():
        return OnnxRuntimeEdgeDecoder(SPEC, options)


@pytest.fixture(scope="module")
def shared(opener: Open) -> Iterator[Decoder]:
    decoder = opener(None)
    yield decoder
    decoder.close()


@pytest.fixture
def decoder(shared: Decoder) -> Iterator[Decoder]:
    """Shared by the tests, each of which must leave it sound and with every place free."""
    yield shared
    shared.check_integrity()
    sequences = [shared.new_sequence() for _ in range(shared.limits.max_sequences)]
    for sequence in sequences:
        sequence.close()


@pytest.fixture
def several(shared: Decoder) -> None:
    """For tests that need more than one sequence at a time."""
    if shared.limits.max_sequences == 1:
        pytest.skip(f"{shared.device} takes one sequence")


@pytest.fixture
def snapshots(shared: Decoder) -> None:
    sequence = shared.new_sequence()
    snapshot = sequence.snapshot()
    sequence.close()
    if snapshot is None:
        pytest.skip(f"{shared.device} takes no snapshots")


@pytest.fixture
def small(opener: Open) -> Iterator[Decoder]:
    """With 128 tokens of KV cache."""
    decoder = opener(128)
    yield decoder
    decoder.check_integrity()
    decoder.close()
