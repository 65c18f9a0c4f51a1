"""What is CoreML's own: provider options, the static capacity, float16. The rest is the contract's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devices.base import DecoderOptions, DecoderSpec, Step
from devices.errors import ContextOverflow, DeviceUnavailable, EngineError
from devices.names import ALIASES, parse_device
from devices.onnxruntime_coreml import OnnxRuntimeCoreMLDecoder, coreml_options
from devices.registry import choose_device, open_decoder
from exporters.graphs import Engine, write_graph
from exporters.onnx_coreml_builder import STEP
from exporters.onnx_operators import WeightFormat
from exporters.synthetic import SyntheticCheckpoint
from tests.decoder_spec import decoder_spec

EMULATED = "onnxruntime:coreml-emulated"
OPTIONS = DecoderOptions(max_sequences=2, prefill_chunk=200, kv_tokens=1024, threads=1)


def make(folder: Path, engine: Engine, weights: WeightFormat) -> DecoderSpec:
    checkpoint = SyntheticCheckpoint("tiny")
    arch = checkpoint.architecture
    runs_on, file = write_graph(checkpoint, engine, weights, folder / "model", folder)
    return decoder_spec(arch, runs_on, folder / "model" / file, 600)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    return make(tmp_path_factory.mktemp("fp16"), "onnx-coreml", "fp16")


def ids(length: int) -> Any:
    return np.random.default_rng(length).integers(0, 64, length)


def test_nobody_gets_the_emulated_one_unasked() -> None:
    assert not any(EMULATED in names for names in ALIASES.values())
    assert EMULATED not in parse_device("coreml", fallback=True)
    assert "emulated" in choose_device(EMULATED).hardware


def test_without_a_mac() -> None:
    with pytest.raises(DeviceUnavailable, match=r"finds no CoreMLExecutionProvider here; CoreML needs macOS"):
        choose_device("coreml")


def test_provider_options_are_those_of_the_documentation(half: DecoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    asked = []

    def session(path: str, options: Any, providers: Any) -> Any:
        asked.append((Path(path).name, providers))
        return plain(path, options, providers=["CPUExecutionProvider"])

    plain = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    cache = Path("/somewhere/compiled")
    decoder = OnnxRuntimeCoreMLDecoder(half, replace(OPTIONS, cache_dir=cache))
    assert decoder.device == "onnxruntime:coreml"
    told = {
        "ModelFormat": "MLProgram",
        "MLComputeUnits": "ALL",
        "RequireStaticInputShapes": "1",
        "ModelCacheDirectory": str(cache / f"coreml-{onnxruntime.__version__}"),
    }
    providers = [("CoreMLExecutionProvider", told), "CPUExecutionProvider"]
    assert asked == [("model.onnx", providers), ("decode.onnx", providers)]
    assert "ModelCacheDirectory" not in coreml_options(None)
    decoder.close()


def test_float16_is_near_float32_on_the_cpu(half: DecoderSpec, tmp_path: Path) -> None:
    """Prompts of less, just and more than a step, and what follows them."""
    exact = open_decoder(make(tmp_path, "onnx", "fp32"), "onnxruntime:cpu", OPTIONS)
    decoder = open_decoder(half, EMULATED, OPTIONS)
    for length in (STEP - 1, STEP, STEP + 1, 2 * STEP + 3):
        rows = []
        for each in (exact, decoder):
            sequence = each.new_sequence()
            (first,) = each.forward([Step(sequence, ids(length))])
            rows.append(np.concatenate([first, *(each.forward([Step(sequence, np.array([t]))])[0] for t in (3, 5))]))
            sequence.close()
        assert np.abs(rows[0] - rows[1]).max() < 0.02 * np.abs(rows[0]).max()
    exact.close()
    decoder.close()


def test_a_cache_of_float16(half: DecoderSpec) -> None:
    decoder = open_decoder(half, EMULATED, OPTIONS)
    assert decoder.limits.kv_bytes_per_token == 2 * half.num_layers * half.num_kv_heads * half.head_dim * 2
    sequence = decoder.new_sequence()
    decoder.forward([Step(sequence, ids(70))])
    snapshot = sequence.snapshot()
    assert snapshot is not None
    assert {array.dtype for array in snapshot.arrays} == {np.dtype(np.float16)}
    decoder.close()
    with pytest.raises(DeviceUnavailable, match="keeps keys and values as float16, not int8"):
        open_decoder(half, EMULATED, replace(OPTIONS, kv_type="int8"))


def test_the_graphs_capacity_is_the_context(half: DecoderSpec) -> None:
    decoder = open_decoder(replace(half, max_context=100_000), EMULATED, replace(OPTIONS, kv_tokens=None))
    capacity = decoder.limits.max_context
    assert capacity == decoder.limits.kv_tokens == 1024  # of the model: under what a graph holds at most
    sequence = decoder.new_sequence()
    for _ in range(capacity // 200):
        decoder.forward([Step(sequence, ids(200), 0)])
    decoder.forward([Step(sequence, ids(capacity % 200), 1)])
    assert sequence.length == capacity
    with pytest.raises(ContextOverflow):
        decoder.forward([Step(sequence, ids(1))])
    decoder.close()


def test_a_graph_for_another_engine(tmp_path: Path) -> None:
    spec = replace(make(tmp_path, "onnx", "fp32"), engine="onnxruntime-coreml")
    with pytest.raises(EngineError, match=r"decode\.onnx failed"):
        open_decoder(spec, EMULATED, OPTIONS)
    (spec.model.parent / "decode.onnx").write_bytes(spec.model.read_bytes())
    with pytest.raises(EngineError, match="export it with --engine onnx-coreml"):
        open_decoder(spec, EMULATED, OPTIONS)
