"""What only the CUDA decoder does, and every family on it. Without a GPU these are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from devices import Decoder, DecoderOptions, DecoderSpec, Step, open_decoder
from devices.errors import EngineError, OutOfKVCache
from exporters.onnx_operators import WeightFormat
from exporters.quantize import quantize
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from exporters.weights import QuantizedTensor
from tests.devices.written import everything, skip_without, written
from tests.exporters.random_checkpoint import ARCHITECTURE, RandomCheckpoint

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"


@pytest.fixture(scope="module", autouse=True)
def cuda() -> None:
    skip_without("cuda")


@pytest.mark.parametrize("family", sorted(path.name for path in FAMILIES.iterdir()))
def test_family_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    spec = written(SafetensorsCheckpoint(FAMILIES / family), tmp_path, "onnx-cuda", "fp16")
    decoder = open_decoder(spec, "cuda", DecoderOptions(max_sequences=4, prefill_chunk=96, kv_tokens=512))
    # Transformers itself, computing in these types: 0.015 of the largest logit at most, 0.03 for Gemma in bfloat16
    tolerance = 0.06 if family.startswith("gemma") else 0.03
    with np.load(FAMILIES / family / "reference.npz") as arrays:
        ids = arrays["ids"].astype(np.int64)
        for length in (7, 24, 72):
            expected = arrays[f"logits_{length}"]
            for sizes in ((), (1, 3, 1, 17, 1, 1, 30)):
                error = np.abs(everything(decoder, ids[:length], sizes) - expected).max() / np.abs(expected).max()
                assert error < tolerance
    decoder.close()


LONG = replace(ARCHITECTURE, max_context=2048)
CHUNK = 64


def ids(seed: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 160, length)


def close(a: NDArray[np.float32], b: NDArray[np.float32], tolerance: float = 0.02) -> None:
    assert a.shape == b.shape
    assert np.abs(a - b).max() < tolerance * np.abs(b).max()


@pytest.fixture(scope="module")
def long_spec(tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    return written(RandomCheckpoint(LONG), tmp_path_factory.mktemp("long"), "onnx-cuda", "fp16")


@pytest.fixture(scope="module")
def decoder(long_spec: DecoderSpec) -> Iterator[Decoder]:
    decoder = open_decoder(long_spec, "cuda", DecoderOptions(max_sequences=6, prefill_chunk=CHUNK, kv_tokens=4096))
    assert decoder.device == "onnxruntime:cuda"
    yield decoder
    decoder.check_integrity()
    decoder.close()


def test_a_full_chunk_is_as_an_odd_one(decoder: Decoder) -> None:
    """The first replays a CUDA graph, again and again."""
    tokens = ids(1, 4 * CHUNK)
    expected = everything(decoder, tokens, sizes=(CHUNK - 1,) * 5)
    for _ in range(3):
        sequence = decoder.new_sequence()
        for start in range(0, len(tokens), CHUNK):
            rows = (start // CHUNK) % 2
            (got,) = decoder.forward([Step(sequence, tokens[start : start + CHUNK], rows)])
            assert len(got) == rows
            if rows:
                close(got, expected[start + CHUNK - 1 : start + CHUNK])
        sequence.close()


@pytest.mark.parametrize("streams", [1, 2, 3, 5, 6])
def test_streams_across_ranges_of_length(decoder: Decoder, streams: int) -> None:
    """Lengths past 512 and 1024 go to other graphs, in which attention takes a sequence apart."""
    starts = [505, 1020, 300, 508, 20, 600][:streams]
    texts = [ids(seed, start + 12) for seed, start in enumerate(starts)]
    expected = [everything(decoder, text, sizes=(CHUNK,) * 40) for text in texts[:2]]
    sequences = [decoder.new_sequence() for _ in texts]
    for sequence, text, start in zip(sequences, texts, starts, strict=True):
        for at in range(0, start, CHUNK):
            decoder.forward([Step(sequence, text[at : min(at + CHUNK, start)], 0)])
    for offset in range(12):
        batch = [
            Step(sequence, text[start + offset :][:1], int((index + offset) % 3 > 0))
            for index, (sequence, text, start) in enumerate(zip(sequences, texts, starts, strict=True))
        ]
        results = decoder.forward(batch)
        for step, got, whole, start in zip(batch, results, expected, starts, strict=False):
            assert len(got) == step.rows
            if step.rows:
                close(got, whole[start + offset :][:1])
    for sequence in sequences:
        sequence.close()


def test_batch_invariance_is_to_the_last_bit(long_spec: DecoderSpec) -> None:
    options = DecoderOptions(max_sequences=4, prefill_chunk=CHUNK, kv_tokens=2048, batch_invariant=True)
    decoder = open_decoder(long_spec, "cuda", options)
    alone, one, two = (decoder.new_sequence() for _ in range(3))
    decoder.forward([Step(alone, ids(1, 50))])
    decoder.forward([Step(two, ids(2, 7)), Step(one, ids(1, 50))])
    for token in range(9):
        (expected,) = decoder.forward([Step(alone, np.array([token]))])
        other, got = decoder.forward([Step(two, np.array([3])), Step(one, np.array([token]))])
        assert np.array_equal(got, expected)
        assert not np.array_equal(other, got)
    decoder.close()


def test_what_sequences_share_counts_once(long_spec: DecoderSpec) -> None:
    options = DecoderOptions(max_sequences=4, prefill_chunk=CHUNK, kv_tokens=640)
    decoder = open_decoder(long_spec, "cuda", options)
    parent = decoder.new_sequence()
    for start in range(0, 512, CHUNK):
        decoder.forward([Step(parent, ids(1, 512)[start : start + CHUNK])])
    forks = [parent.fork(512) for _ in range(3)]
    decoder.forward([Step(fork, ids(seed, 30)) for seed, fork in enumerate(forks)])
    with pytest.raises(OutOfKVCache, match=r"40 more tokens do not fit the KV cache of 640, 602 are held"):
        decoder.forward([Step(forks[0], ids(9, 40))])
    assert forks[0].length == 542
    decoder.check_integrity()
    decoder.close()


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_packed_weights_are_the_very_ones(weights: WeightFormat, tmp_path: Path) -> None:
    def blocks(name: str, values: NDArray[np.float32]) -> QuantizedTensor:
        bits = 8 if name == "embed" else 4
        rounded = quantize(values, bits, 32)
        assert isinstance(rounded, QuantizedTensor)
        shift = 0.0 if bits == 8 else 0.4  # as GGUF's Q4_1
        return QuantizedTensor(rounded.codes, rounded.scale, rounded.zero + np.float32(shift), bits)

    arch = replace(ARCHITECTURE, tied_head=True)
    results = []
    forms: tuple[WeightFormat, ...] = ("fp16", weights)
    for form in forms:
        (tmp_path / form).mkdir()
        spec = written(RandomCheckpoint(arch, blocks), tmp_path / form, "onnx-cuda", form)
        decoder = open_decoder(spec, "cuda", DecoderOptions(max_sequences=2, prefill_chunk=CHUNK, kv_tokens=512))
        results.append(everything(decoder, ids(1, 60), sizes=(20, 1, 1, 3)))
        decoder.close()
    close(results[1], results[0])


def test_a_cache_larger_than_the_gpu(long_spec: DecoderSpec) -> None:
    with pytest.raises(EngineError, match=r"bytes of GPU memory cannot be had, \d+ are free .*lower kv_tokens"):
        open_decoder(long_spec, "cuda", DecoderOptions(kv_tokens=10**9))
    open_decoder(long_spec, "cuda", DecoderOptions(kv_tokens=512)).close()  # nothing of it is left


def test_the_arena_is_capped(long_spec: DecoderSpec) -> None:
    """Its first MiB is taken whatever the limit is; the second does not hold the activations of 8192 tokens."""
    options = DecoderOptions(
        max_sequences=4, prefill_chunk=2048, kv_tokens=8192, properties={"gpu_mem_limit": str(2 << 20)}
    )
    decoder = open_decoder(long_spec, "cuda", options)
    batch = [Step(decoder.new_sequence(), ids(seed, 2048)) for seed in range(4)]
    with pytest.raises(EngineError, match=r"ONNX Runtime: .*Available memory"):
        decoder.forward(batch)
    decoder.close()


def test_a_graph_for_another_provider(tmp_path: Path) -> None:
    spec = replace(written(RandomCheckpoint(ARCHITECTURE), tmp_path, "onnx", "fp16"), engine="onnxruntime-cuda")
    with pytest.raises(EngineError):
        open_decoder(spec, "cuda", DecoderOptions(kv_tokens=512))
