"""Sequences with KV caches of different types, on one decoder and in one allowance of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec, KVChoosing, Step
from devices.errors import EngineError, OutOfKVCache, OutOfSequences
from devices.kv_types import KVWish
from devices.onnxruntime_edge import OnnxRuntimeEdgeDecoder
from devices.registry import open_decoder
from exporters.graphs import write_graph
from exporters.synthetic import SyntheticCheckpoint
from tests.decoder_spec import decoder_spec
from tests.devices.written import skip_without

OPTIONS = DecoderOptions(max_sequences=4, prefill_chunk=64, kv_tokens=256, threads=1)
Open = Callable[[KVWish], OnnxRuntimeEdgeDecoder]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    skip_without("edge:cpu")
    checkpoint, folder = SyntheticCheckpoint("tiny"), tmp_path_factory.mktemp("tiny")
    arch = checkpoint.architecture
    engine, file = write_graph(checkpoint, "onnx-edge", "fp32", folder / "model", folder)
    return decoder_spec(arch, engine, folder / "model" / file, 1024)


@pytest.fixture(scope="module")
def opening(spec: DecoderSpec) -> Iterator[Open]:
    opened = []

    def opening(kv_type: KVWish) -> OnnxRuntimeEdgeDecoder:
        decoder = open_decoder(spec, "edge:cpu", replace(OPTIONS, kv_type=kv_type))
        assert isinstance(decoder, OnnxRuntimeEdgeDecoder)
        opened.append(decoder)
        return decoder

    yield opening
    for decoder in opened:
        decoder.check_integrity()
        decoder.close()


@pytest.fixture
def decoder(opening: Open) -> OnnxRuntimeEdgeDecoder:
    return opening("auto")


def ids(seed: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 64, length)


def test_what_there_is_to_choose(decoder: OnnxRuntimeEdgeDecoder, opening: Open) -> None:
    limits = decoder.limits
    assert isinstance(decoder, KVChoosing)
    assert [each.kv_type for each in limits.kv_choices] == ["float16", "int8"]
    narrow = opening("int8").limits
    assert limits.bytes_per_token("int8") == narrow.kv_bytes_per_token < limits.kv_bytes_per_token
    assert limits.bytes_per_token(None) == limits.bytes_per_token("float16") == limits.kv_bytes_per_token
    assert limits.kv_tokens == 256
    assert limits.longest == 256 * limits.kv_bytes_per_token // narrow.kv_bytes_per_token
    assert narrow.kv_choices == ()
    assert narrow.longest == narrow.kv_tokens == 256
    with pytest.raises(ValueError, match="no KV cache of float32"):
        decoder.new_sequence_in("float32")
    with pytest.raises(ValueError, match="no KV cache of float16"):
        opening("int8").new_sequence_in("float16")


def test_beside_each_other_they_are_as_alone(decoder: OnnxRuntimeEdgeDecoder, opening: Open) -> None:
    """To the last bit."""
    expected = {}
    for kv_type in ("float16", "int8"):
        plain = opening(kv_type)
        sequence = plain.new_sequence()
        rows = [plain.forward([Step(sequence, part, len(part))])[0] for part in np.split(ids(1, 96), [40, 41, 60])]
        expected[kv_type] = np.concatenate(rows)
    assert not np.array_equal(expected["float16"], expected["int8"])
    wide, narrow = decoder.new_sequence(), decoder.new_sequence_in("int8")
    other = decoder.new_sequence_in("float16")
    got: dict[str, list[NDArray[np.float32]]] = {"float16": [], "int8": []}
    for turn, part in enumerate(np.split(ids(1, 96), [1, 2, 40, 41])):
        batch = [Step(wide, part, len(part)), Step(other, ids(2, 3), 3), Step(narrow, part, len(part))]
        order = [[0, 1, 2], [2, 1, 0], [2, 0, 1]][turn % 3]
        results = decoder.forward([batch[place] for place in order])
        got["float16"].append(results[order.index(0)])
        got["int8"].append(results[order.index(2)])
    for kv_type, rows in got.items():
        assert np.array_equal(np.concatenate(rows), expected[kv_type])
    for sequence in (wide, narrow, other):
        sequence.close()


def test_forks_and_snapshots_keep_their_type(decoder: OnnxRuntimeEdgeDecoder) -> None:
    narrow = decoder.new_sequence_in("int8")
    decoder.forward([Step(narrow, ids(3, 64), 0)])
    fork = narrow.fork(50)
    assert fork.nbytes == 2 * 32 * decoder.limits.bytes_per_token("int8")
    twin = decoder.new_sequence_in("int8")
    snapshot = narrow.snapshot()
    twin.restore(snapshot)
    one, other = decoder.forward([Step(narrow, ids(4, 5)), Step(twin, ids(4, 5))])
    assert np.array_equal(one, other)
    wide = decoder.new_sequence()
    with pytest.raises(EngineError, match="another KV precision"):
        wide.restore(snapshot)
    assert wide.length == 0
    for sequence in (narrow, fork, twin, wide):
        sequence.close()


def test_the_allowance_is_in_bytes(decoder: OnnxRuntimeEdgeDecoder) -> None:
    """256 tokens of float16, or nearly twice as many of int8, or some of both."""
    limits = decoder.limits
    narrow = decoder.new_sequence_in("int8")
    for _ in range(4):
        decoder.forward([Step(narrow, ids(5, 64), 0)])
    left = (limits.kv_bytes - 256 * limits.bytes_per_token("int8")) // limits.kv_bytes_per_token
    assert 60 < left < 128
    wide = decoder.new_sequence()
    for part in np.split(ids(6, left - 1), [50]):
        decoder.forward([Step(wide, part, 0)])
    with pytest.raises(OutOfKVCache, match="2 more tokens do not fit"):
        decoder.forward([Step(narrow, ids(7, 1), 0), Step(wide, ids(7, 1), 0)])
    assert (narrow.length, wide.length) == (256, left - 1)
    decoder.forward([Step(wide, ids(7, 1), 0)])
    wide.crop(left - 10)
    decoder.forward([Step(narrow, ids(7, 9), 0)])
    for sequence in (narrow, wide):
        sequence.close()


def test_places_are_counted_over_all(decoder: OnnxRuntimeEdgeDecoder) -> None:
    sequences = [decoder.new_sequence_in(kv_type) for kv_type in ("int8", "float16", "int8")]
    sequences.append(sequences[0].fork(0))
    with pytest.raises(OutOfSequences):
        decoder.new_sequence()
    with pytest.raises(OutOfSequences):
        decoder.new_sequence_in("int8")
    with pytest.raises(OutOfSequences):
        sequences[1].fork(0)
    for sequence in sequences:
        sequence.close()


@pytest.mark.parametrize("device", ["onnxruntime:cpu", "openvino:cpu"])
def test_elsewhere_there_is_no_choice(device: str, tmp_path: Path) -> None:
    checkpoint = SyntheticCheckpoint("tiny")
    arch = checkpoint.architecture
    engine, file = write_graph(
        checkpoint, "onnx" if device.startswith("onnx") else "openvino", "fp32", tmp_path / "m", tmp_path
    )
    spec = decoder_spec(arch, engine, tmp_path / "m" / file, 256)
    decoder = open_decoder(spec, device, replace(OPTIONS, kv_type="auto"))
    assert decoder.limits.kv_choices == ()
    assert decoder.limits.longest == 256
    decoder.close()
