"""What is particular to the decoder of our own kernels: bindings, blocks and KV cache over a stand-in for the session,
and every family over the kernels themselves; the contract is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from devices import DecoderOptions, DecoderSpec, Step, open_decoder
from devices.base import Snapshot
from devices.errors import ContextOverflow, DeviceError, DeviceUnavailable, EngineError, OutOfKVCache
from devices.onnxruntime_edge import _KEPT_BINDINGS, BLOCK, OnnxRuntimeEdgeDecoder
from exporters.onnx_operators import WeightFormat
from exporters.quantize import quantize
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from exporters.weights import QuantizedTensor
from tests.devices.edge_session import SPEC, EdgeSession, standing_in
from tests.devices.written import everything, skip_without, written
from tests.exporters.random_checkpoint import ARCHITECTURE, RandomCheckpoint

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
Open = Callable[..., tuple[OnnxRuntimeEdgeDecoder, EdgeSession]]


def ids(seed: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 64, length)


# ---- over a stand-in for the session


@pytest.fixture
def opening() -> Iterator[Open]:
    with ExitStack() as stack:
        sessions = stack.enter_context(standing_in())

        def open_(spec: DecoderSpec = SPEC, **options: int) -> tuple[OnnxRuntimeEdgeDecoder, EdgeSession]:
            settings = {"max_sequences": 6, "prefill_chunk": 64, "kv_tokens": 1024, **options}
            decoder = OnnxRuntimeEdgeDecoder(spec, DecoderOptions(**settings))  # type: ignore[arg-type]  # all are ints
            stack.callback(decoder.close)
            return decoder, sessions[-1]

        yield open_


def test_a_mixed_batch_is_one_call(opening: Open) -> None:
    decoder, session = opening()
    a, b, c = (decoder.new_sequence() for _ in range(3))
    decoder.forward([Step(a, ids(1, 40), 0), Step(b, ids(2, 3), 2)])
    decoder.forward([Step(c, ids(3, 5), 2), Step(a, ids(4, 1), 0), Step(b, ids(5, 2))])
    first, second = session.calls
    assert first["begins"].tolist() == [0, 40, 43]
    assert first["past"].tolist() == [0, 0]
    assert first["positions"].tolist() == [*range(40), *range(3)]
    assert first["row_index"].tolist() == [41, 42]
    assert first["block_table"].shape == (2, 8)
    assert second["input_ids"].tolist() == [*ids(3, 5), *ids(4, 1), *ids(5, 2)]
    assert second["begins"].tolist() == [0, 5, 6, 8]
    assert second["past"].tolist() == [0, 40, 3]
    assert second["positions"].tolist() == [0, 1, 2, 3, 4, 40, 3, 4]
    assert second["row_index"].tolist() == [3, 4, 7]
    for row, sequence in zip(second["block_table"], (c, a, b), strict=True):
        assert row[: len(sequence.table.blocks)].tolist() == sequence.table.blocks


def test_a_sequence_that_grows_keeps_its_binding(opening: Open) -> None:
    decoder, session = opening()
    sequence = decoder.new_sequence()
    decoder.forward([Step(sequence, ids(1, 20))])
    made = len(session.bound)
    expected = everything(opening()[0], ids(2, 260), sizes=(64,) * 4)
    sequence.crop(0)
    for token, row in zip(ids(2, 260), expected, strict=True):
        (got,) = decoder.forward([Step(sequence, np.array([token]))])
        assert np.array_equal(got[0], row)
        del got
    assert len(session.bound) == made + 2  # tables of 8 blocks, and of 16


def test_logits_are_written_over_only_once_nobody_holds_them(opening: Open) -> None:
    decoder, session = opening()
    text = ids(1, 8)
    expected = everything(opening()[0], text)
    sequence = decoder.new_sequence()
    decoder.forward([Step(sequence, text[:6], 0)])

    def last(rows: int) -> NDArray[np.float32]:
        sequence.crop(6)
        return decoder.forward([Step(sequence, text[6:], rows)])[0]

    place = last(2).ctypes.data
    made = len(session.bound)
    kept = last(2)[1]  # a view of a view
    assert (kept.ctypes.data - kept.nbytes, len(session.bound)) == (place, made)
    other, another = last(2), last(1)
    assert len({place, other.ctypes.data, another.ctypes.data}) == 3
    other[:], another[:] = 0, 0
    assert np.array_equal(kept, expected[7])
    del other, another
    assert np.array_equal(last(2), expected[6:])


def test_a_block_that_another_takes_over_is_noticed(opening: Open) -> None:
    """The table of the kept binding names the blocks of the sequence before."""
    decoder, _ = opening()
    judge, _ = opening()
    for seed in range(4):
        sequences = [decoder.new_sequence() for _ in range(2)]
        texts = [ids(10 * seed + index, 70 + index) for index in range(2)]
        for sequence, text in zip(sequences, texts, strict=True):
            decoder.forward([Step(sequence, text[:60], 0)])
            decoder.forward([Step(sequence, text[60:-1], 0)])
        fork = sequences[seed % 2].fork(65)
        batch = [Step(sequence, text[-1:]) for sequence, text in zip(sequences, texts, strict=True)]
        for got, text in zip(decoder.forward(batch), texts, strict=True):
            assert np.array_equal(got, everything(judge, text, sizes=(64,))[-1:])
        for sequence in (fork, *sequences)[:: 1 if seed % 2 else -1]:
            sequence.close()
    decoder.check_integrity()


def test_bindings_of_short_steps_only_are_kept_and_not_too_many(opening: Open) -> None:
    decoder, session = opening()
    sequence = decoder.new_sequence()
    for _ in range(2):
        decoder.forward([Step(sequence, ids(1, 17))])
    assert (len(decoder._bindings), len(session.bound)) == (0, 2)
    for rows in range(12):
        for count in range(max(rows, 1), 13):
            sequence.crop(0)
            decoder.forward([Step(sequence, ids(count, count), rows)])
    assert len(decoder._bindings) == _KEPT_BINDINGS < len(session.bound)
    newest = len(session.bound)
    sequence.crop(0)
    decoder.forward([Step(sequence, ids(12, 12), 11)])
    assert len(session.bound) == newest


def test_what_it_says_of_itself(opening: Open) -> None:
    decoder, _ = opening(kv_tokens=100)
    assert decoder.device == "edge:cpu"
    assert decoder.limits.invariant
    assert decoder.limits.kv_tokens == 100
    assert decoder.limits.kv_bytes_per_token == 3 * 2 * 2 * 16 * 2
    assert decoder.limits.kv_block == 1


def test_kv_tokens_is_what_counts(opening: Open) -> None:
    """Not blocks: each sequence may leave its last one partly empty. What sequences share counts once."""
    decoder, _ = opening(kv_tokens=320)
    parent = decoder.new_sequence()
    for start in range(0, 256, 64):
        decoder.forward([Step(parent, ids(1, 256)[start : start + 64])])
    forks = [parent.fork(256) for _ in range(3)]
    decoder.forward([Step(fork, ids(seed, 15)) for seed, fork in enumerate(forks)])
    with pytest.raises(OutOfKVCache, match=r"20 more tokens do not fit the KV cache of 320, 301 are held"):
        decoder.forward([Step(forks[0], ids(9, 20))])
    assert forks[0].length == 271
    decoder.forward([Step(forks[0], ids(9, 19))])
    decoder.check_integrity()


def test_snapshots_are_blocks_of_each_layer(opening: Open) -> None:
    decoder, _ = opening()
    sequence = decoder.new_sequence()
    decoder.forward([Step(sequence, ids(1, 40))])
    taken = sequence.snapshot()
    assert [(array.shape, array.dtype) for array in taken.arrays] == [((2, 2, BLOCK * 16 * 2), np.uint8)] * 6
    other = decoder.new_sequence()
    wrong = [
        tuple(array.astype(np.float32) for array in taken.arrays),
        tuple(array[:1] for array in taken.arrays),
        taken.arrays[:-1],
    ]
    for arrays in wrong:
        with pytest.raises(EngineError, match="another model or device, or with another KV precision"):
            other.restore(Snapshot(40, arrays))
    assert other.length == 0
    empty = other.snapshot()
    other.restore(empty)
    other.restore(taken)
    assert np.array_equal(*decoder.forward([Step(other, ids(2, 1)), Step(sequence, ids(2, 1))]))


def test_longrope_sequences_keep_their_factors(opening: Open) -> None:
    decoder, session = opening(replace(SPEC, rope_switch=32))
    short, long = decoder.new_sequence(32), decoder.new_sequence(33)
    decoder.forward([Step(short, ids(1, 32)), Step(long, ids(1, 32))])
    assert session.calls[-1]["positions"].tolist() == [*range(32), *range(320, 352)]
    with pytest.raises(ContextOverflow, match="32"):
        decoder.forward([Step(short, ids(1, 1))])
    fork = long.fork(20)  # of a length that the short factors would hold
    decoder.forward([Step(fork, ids(1, 1))])
    assert session.calls[-1]["positions"].tolist() == [340]


def test_engine_errors_are_translated(opening: Open) -> None:
    decoder, session = opening()
    session.error = RuntimeError("out of something")
    with pytest.raises(EngineError, match="running a batch failed in ONNX Runtime: out of something") as caught:
        decoder.forward([Step(decoder.new_sequence(), ids(1, 1))])
    assert caught.value.__cause__ is session.error


def test_a_cache_without_address_space(opening: Open) -> None:
    for tokens in (10**12, 10**18):
        with pytest.raises(EngineError, match=r"KV cache of \d+ bytes .*lower kv_tokens"):
            opening(kv_tokens=tokens)
    with pytest.raises(ValueError, match="kv_tokens must be at least 1"):
        opening(kv_tokens=0)


def test_a_graph_with_another_cache(opening: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = SimpleNamespace(name="kv_cache", type="tensor(float16)", shape=["blocks", 3, 2, 2, 32 * 16])
    monkeypatch.setattr(EdgeSession, "get_inputs", lambda self: [fixed])
    with pytest.raises(EngineError, match=r"model\.onnx has the KV cache .*--engine onnx-edge"):
        opening()
    monkeypatch.setattr(EdgeSession, "get_inputs", lambda self: [])
    with pytest.raises(EngineError, match=r"has the KV cache None, .*--engine onnx-edge"):
        opening()


def test_closing_gives_the_memory_back(opening: Open) -> None:
    decoder, _ = opening()
    sequence = decoder.new_sequence()
    decoder.forward([Step(sequence, ids(1, 5))])
    decoder.close()
    decoder.close()
    assert next(iter(decoder._storages.values())).values.size == 0
    with pytest.raises(DeviceError, match="closed"):
        sequence.snapshot()
    with pytest.raises(DeviceError, match="closed"):
        decoder.new_sequence()


# ---- over the kernels


@pytest.fixture(scope="module")
def kernels() -> None:
    skip_without("edge:cpu")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", sorted(path.name for path in FAMILIES.iterdir()))
def test_family_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    """Within what a float16 KV cache costs: OpenVINO's with one is up to 0.0032 of the largest logit away."""
    spec = written(SafetensorsCheckpoint(FAMILIES / family), tmp_path, "onnx-edge", "fp32")
    options = DecoderOptions(max_sequences=4, prefill_chunk=96, kv_tokens=512, threads=2)
    decoder = open_decoder(spec, "edge:cpu", options)
    with np.load(FAMILIES / family / "reference.npz") as arrays:
        tokens = arrays["ids"].astype(np.int64)
        for length in (7, 24, 72):
            expected = arrays[f"logits_{length}"]
            for sizes in ((), (1, 3, 1, 17, 1, 1, 30)):
                error = np.abs(everything(decoder, tokens[:length], sizes) - expected).max() / np.abs(expected).max()
                assert error < 0.005
    decoder.close()


def blocks(name: str, values: NDArray[np.float32]) -> QuantizedTensor:
    bits = 8 if name == "embed" else 4
    rounded = quantize(values, bits, 32)
    assert isinstance(rounded, QuantizedTensor)
    shift = 0.0 if bits == 8 else 0.4  # as GGUF's Q4_1
    return QuantizedTensor(rounded.codes, rounded.scale, rounded.zero + np.float32(shift), bits)


LONG = replace(ARCHITECTURE, max_context=2048, tied_head=True)
WEIGHTS: tuple[WeightFormat, ...] = ("fp32", "int8", "int4")


@pytest.fixture(scope="module")
def specs(kernels: None, tmp_path_factory: pytest.TempPathFactory) -> dict[WeightFormat, DecoderSpec]:
    """One quantized model in every form."""
    folder = tmp_path_factory.mktemp("long")
    for weights in WEIGHTS:
        (folder / weights).mkdir()
    source = RandomCheckpoint(LONG, blocks)
    return {weights: written(source, folder / weights, "onnx-edge", weights) for weights in WEIGHTS}


def test_quantized_weights_are_the_very_ones(specs: dict[WeightFormat, DecoderSpec]) -> None:
    """But for the rounding of activations, to 16 bits beside 8-bit matrices and to 8 bits beside most 4-bit ones."""
    results = {}
    for weights, spec in specs.items():
        decoder = open_decoder(spec, "edge:cpu", DecoderOptions(max_sequences=2, prefill_chunk=64, threads=2))
        results[weights] = everything(decoder, ids(1, 60), sizes=(20, 1, 1, 3))
        decoder.close()
    largest = np.abs(results["fp32"]).max()
    assert np.abs(results["int8"] - results["fp32"]).max() < 0.02 * largest
    assert np.abs(results["int4"] - results["fp32"]).max() < 0.05 * largest


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_is_computed_alike_whatever_is_beside_it(
    specs: dict[WeightFormat, DecoderSpec], weights: WeightFormat, threads: int
) -> None:
    """To the last bit, without being asked: ``DecoderLimits.invariant``. 700 tokens are several parts of attention."""
    options = DecoderOptions(max_sequences=6, prefill_chunk=256, kv_tokens=4096, threads=threads)
    decoder = open_decoder(specs[weights], "edge:cpu", options)
    text = ids(1, 700)
    expected = everything(decoder, text, sizes=(256, 256))
    assert np.array_equal(everything(decoder, text, sizes=(1, 7, 100, 31, 200, *(1,) * 20, 250)), expected)
    sequence, others = decoder.new_sequence(), [decoder.new_sequence() for _ in range(5)]
    rng, turn = np.random.default_rng(2), 0
    while sequence.length < len(text):
        held = sequence.length
        part = text[held : held + int(rng.choice([1, 1, 5, 60, 150]))]
        beside = [Step(other, ids(turn, int(rng.choice([1, 1, 4]))), 1) for other in others[: turn % 6]]
        batch = [Step(sequence, part, len(part)), *beside]
        place = int(rng.integers(len(batch)))
        batch[0], batch[place] = batch[place], batch[0]
        assert np.array_equal(decoder.forward(batch)[place], expected[held : held + len(part)])
        turn += 1
    decoder.close()


def test_a_cache_of_codes(specs: dict[WeightFormat, DecoderSpec]) -> None:
    """Half as large, nearly the same, and as indifferent to what is beside a token."""
    options = DecoderOptions(max_sequences=3, prefill_chunk=256, kv_tokens=2048, threads=2)
    wide, narrow = (open_decoder(specs["int4"], "edge:cpu", replace(options, kv_type=t)) for t in ("float16", "int8"))
    assert narrow.limits.kv_bytes_per_token / wide.limits.kv_bytes_per_token == (LONG.head_dim + 4) / LONG.head_dim / 2
    text = ids(1, 700)
    expected = everything(wide, text, sizes=(256, 256))[-1]
    cut = everything(narrow, text, sizes=(1, 7, 100, 31, 200, *(1,) * 20, 250))
    assert np.array_equal(cut, everything(narrow, text, sizes=(256, 256)))
    error = np.abs(cut[-1] - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.03
    sequence = narrow.new_sequence()
    narrow.forward([Step(sequence, text[:250], 0)])
    other = narrow.new_sequence()
    other.restore(sequence.snapshot())
    fork = other.fork(240)
    steps = [Step(sequence, text[250:260]), Step(other, text[250:260]), Step(fork, text[240:260])]
    assert all(np.array_equal(row[-1], cut[259]) for row in narrow.forward(steps))
    with pytest.raises(EngineError, match="another KV precision"):
        wide.new_sequence().restore(sequence.snapshot())
    with pytest.raises(DeviceUnavailable, match="edge:cpu keeps keys and values as float16 or int8, not float32"):
        open_decoder(specs["int4"], "edge:cpu", replace(options, kv_type="float32"))
    wide.close()
    narrow.close()


@pytest.mark.usefixtures("kernels")
def test_a_graph_for_another_engine(tmp_path: Path) -> None:
    spec = replace(written(RandomCheckpoint(ARCHITECTURE), tmp_path, "onnx", "fp32"), engine="onnxruntime-edge")
    with pytest.raises(EngineError, match="--engine onnx-edge"):
        open_decoder(spec, "edge:cpu", DecoderOptions(kv_tokens=512))


def test_our_graph_on_another_device(specs: dict[WeightFormat, DecoderSpec]) -> None:
    with pytest.raises(DeviceUnavailable, match="no onnxruntime variant"):
        open_decoder(specs["int4"], "onnxruntime:cpu", DecoderOptions())
    with pytest.raises(EngineError, match="edge_glm"):
        open_decoder(replace(specs["int4"], engine="onnxruntime"), "onnxruntime:cpu", DecoderOptions())
