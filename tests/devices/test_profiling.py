"""What engines tell of their operators, and that it is read for what it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from devices.base import Decoder, DecoderOptions, DecoderSpec, Step
from devices.errors import EngineError
from devices.onnx_nodes import read_products
from devices.onnxruntime_profiling import OnnxRuntimeCounters, read_profile
from devices.openvino_dense import OpenVinoDenseDecoder
from devices.profiling import Phase, Product, Profiled
from devices.registry import open_decoder
from devices.stopwatch import Stopwatch
from exporters.checkpoint import Checkpoint
from exporters.graphs import Engine, write_graph
from exporters.onnx_operators import WeightFormat
from exporters.quantize import QuantizedCheckpoint
from exporters.synthetic import SyntheticCheckpoint
from tests.conftest import usable
from tests.decoder_spec import decoder_spec
from tests.exporters.random_checkpoint import ARCHITECTURE, RandomCheckpoint

GRAPHS: dict[str, Engine] = {"edge:cpu": "onnx-edge", "onnxruntime:cpu": "onnx", "openvino:cpu": "openvino"}
TINY = SyntheticCheckpoint("tiny")
ARCH = TINY.architecture
WIDE = ARCH.num_heads * ARCH.head_dim
QKV = WIDE + 2 * ARCH.num_kv_heads * ARCH.head_dim


def exported(device: str, folder: Path, weights: WeightFormat, checkpoint: Checkpoint = TINY) -> DecoderSpec:
    made = QuantizedCheckpoint(checkpoint, weights) if weights in ("int4", "int8") else checkpoint
    engine, file = write_graph(made, GRAPHS[device], weights, folder / "model", folder)
    return decoder_spec(made.architecture, engine, folder / "model" / file)


def profiled(spec: DecoderSpec, device: str, folder: Path, run: Callable[[Decoder, Any], None]) -> tuple[Phase, ...]:
    options = DecoderOptions(max_sequences=2, kv_tokens=256, threads=1, profile=folder)
    with closing(open_decoder(spec, device, options)) as decoder:
        assert isinstance(decoder, Profiled)
        assert decoder.counters is not None
        run(decoder, decoder.counters)
        return decoder.counters.finish()


def prompt_and_answer(decoder: Decoder, counters: Any) -> None:
    rng = np.random.default_rng(0)

    def step(tokens: int, rows: int = 1) -> None:
        decoder.forward([Step(sequence, rng.integers(0, ARCH.vocab_size, tokens), rows)])

    sequence = decoder.new_sequence()
    step(40)  # before the first phase: forgotten
    counters.begin("prompt")
    step(16, rows=0)
    step(8, rows=2)
    counters.begin("empty")
    counters.begin("answer")
    for _ in range(5):
        step(1)


def head_calls(phase: Phase) -> set[int]:
    products = [(each.calls, each.product) for each in phase.operators if each.product is not None]
    heads = [(calls, product) for calls, product in products if product.outputs == ARCH.vocab_size]
    return {calls for calls, product in heads if product.inner >= ARCH.hidden_size}


def rows_by_size(phase: Phase) -> dict[tuple[int, int], set[int]]:
    found: dict[tuple[int, int], set[int]] = {}
    for each in phase.operators:
        if each.product is not None:
            found.setdefault((each.product.inner, each.product.outputs), set()).add(each.rows)
    return found


@pytest.mark.parametrize("device", GRAPHS)
@pytest.mark.parametrize("weights", ["int4", "fp32"])
def test_products_of_a_network_are_found_with_what_met_them(device: str, weights: WeightFormat, tmp_path: Path) -> None:
    spec = exported(usable(device), tmp_path, weights)
    prompt, answer = profiled(spec, device, tmp_path, prompt_and_answer)
    assert [(phase.name, phase.calls) for phase in (prompt, answer)] == [("prompt", 2), ("answer", 5)]
    for phase, tokens, logits in ((prompt, 24, 2), (answer, 5, 5)):
        assert phase.seconds > 0
        assert sum(each.attends for each in phase.operators) == ARCH.num_layers
        sizes = rows_by_size(phase)
        ffn = ARCH.intermediate_size
        # a graph may add columns for what blocks of weights have in common
        for inner, outputs in ((ARCH.hidden_size, QKV), (WIDE, ARCH.hidden_size), (ffn, ARCH.hidden_size)):
            met = [rows for (k, n), rows in sizes.items() if n == outputs and inner <= k < 2 * inner]
            assert any(tokens in rows for rows in met), (inner, outputs, sizes)
        head = [rows for (k, n), rows in sizes.items() if n == ARCH.vocab_size and k >= ARCH.hidden_size]
        assert any(rows & {logits, 2 * logits} for rows in head), sizes  # one graph computes it in two parts
        # a head without rows reads no weights
        assert head_calls(phase) == {1 if phase is prompt else 5}
        assert phase.calls in {each.calls for each in phase.operators if each.product is not None}
        products = [each.product for each in phase.operators if each.product is not None]
        largest = max(products, key=lambda product: product.inner * product.outputs)
        assert largest.integer == (weights == "int4")
        bits = 8 * largest.weight_bytes / (largest.inner * largest.outputs)
        assert 32 <= bits < 33 if weights == "fp32" else 4 < bits < 12


@pytest.mark.parametrize("device", ["edge:cpu", "onnxruntime:cpu"])
def test_the_typical_call_is_told_in_order(device: str, tmp_path: Path) -> None:
    spec = exported(usable(device), tmp_path, "int4")
    _, answer = profiled(spec, device, tmp_path, prompt_and_answer)
    starts = [event.start for event in answer.typical_call]
    assert starts == sorted(starts)
    assert starts[0] >= 0
    # one call of each operator
    assert Counter(event.name for event in answer.typical_call) == Counter(each.name for each in answer.operators)


def test_a_graph_with_caches_of_its_own(tmp_path: Path) -> None:
    capped = RandomCheckpoint(replace(ARCHITECTURE, attention_softcap=5.0))
    spec = exported("openvino:cpu", tmp_path, "fp32", capped)
    kinds: list[type] = []

    def run(decoder: Decoder, counters: Any) -> None:
        kinds.append(type(decoder))
        sequences = [decoder.new_sequence() for _ in range(2)]
        counters.begin("both")
        decoder.forward([Step(sequence, np.arange(4, dtype=np.int64)) for sequence in sequences])

    (both,) = profiled(spec, "openvino:cpu", tmp_path, run)
    assert kinds == [OpenVinoDenseDecoder]
    assert both.calls == 2  # one for each sequence
    assert {8} in rows_by_size(both).values()


@pytest.mark.parametrize("device", GRAPHS)
def test_nothing_is_counted_unless_asked(device: str, tmp_path: Path) -> None:
    spec = exported(usable(device), tmp_path, "int4")
    with closing(open_decoder(spec, device, DecoderOptions(kv_tokens=64, threads=1))) as decoder:
        assert isinstance(decoder, Profiled)
        assert decoder.counters is None


def test_products_in_a_file(tmp_path: Path) -> None:
    def tensor(name: str, *dims: int, kind: int = onnx.TensorProto.FLOAT) -> onnx.TensorProto:
        size = int(np.prod(dims)) * (4 if kind == onnx.TensorProto.FLOAT else 1)
        return onnx.helper.make_tensor(name, kind, dims, bytes(size), raw=True)

    node = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("MatMul", ["x", "plain"], ["a"], "plain"),
            node("MatMul", ["x", "a"], ["b"], "of activations"),
            node("Gemm", ["x", "turned", "bias"], ["c"], "turned", transB=1, alpha=1.0),
            node("MatMulNBits", ["x", "codes", "scales"], ["d"], "codes", domain="com.microsoft", K=32, N=6, bits=4),
            node("Add", ["x", "plain"], ["e"], "no product"),
        ],
        "g",
        [],
        [],
        [
            tensor("plain", 5, 7),
            tensor("turned", 3, 5),
            tensor("bias", 3),
            tensor("codes", 6, 1, 16, kind=onnx.TensorProto.UINT8),
            tensor("scales", 6),
        ],
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.helper.make_model(graph, producer_name="a test").SerializeToString())
    assert read_products(path) == {
        "plain": Product(5, 7, 140, False),
        "turned": Product(5, 3, 72, False),
        "codes": Product(32, 6, 6 * 16 + 24, True),
    }


NONE = {"empty": b"", "cut": b"\x3a\xff", "text": b"no ONNX file at all", "zeros": bytes(100)}


@pytest.mark.parametrize("data", NONE.values(), ids=NONE)
def test_a_file_that_is_none(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(EngineError, match=r"cannot read the operators of .*model\.onnx"):
        read_products(path)
    with pytest.raises(EngineError, match="cannot read the profile that ONNX Runtime should have written"):
        read_profile(path)


def test_a_profile_that_lost_calls(tmp_path: Path) -> None:
    """After a million events ONNX Runtime writes no more."""
    path = tmp_path / "profile.json"
    path.write_text(json.dumps([{"cat": "Session", "name": "model_run", "ts": 0, "dur": 1}]))
    stopwatch = Stopwatch()
    counters = OnnxRuntimeCounters(SimpleNamespace(end_profiling=lambda: str(path)), tmp_path, stopwatch)
    counters.begin("both")
    for _ in range(2):
        with stopwatch:
            pass
    with pytest.raises(EngineError, match=r"tells of 1 calls, and there were 2.*profile a shorter run"):
        counters.finish()
