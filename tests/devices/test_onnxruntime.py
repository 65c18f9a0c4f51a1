"""What is ONNX Runtime's own: rows that move and idle, memory that follows the tokens, translated errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec, Snapshot, Step
from devices.dense_decoder import DenseSequence
from devices.errors import ContextOverflow, DeviceError, DeviceUnavailable, EngineError, OutOfKVCache
from devices.kv_rows import KVRows
from devices.onnxruntime_gqa import OnnxRuntimeDecoder, RowKV, _group
from exporters.network import build
from exporters.onnx_builder import OnnxBuilder
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from tests.conftest import FIXTURES
from tests.decoder_spec import decoder_spec

Open = Callable[..., OnnxRuntimeDecoder]


def _spec(family: str, folder: Path) -> DecoderSpec:
    checkpoint = SafetensorsCheckpoint(FIXTURES / "families" / family)
    arch = checkpoint.architecture
    builder = OnnxBuilder(arch, "fp32", folder)
    build(checkpoint, builder)
    builder.save(folder)
    return decoder_spec(arch, "onnxruntime", folder / "model.onnx")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    return _spec("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def opening(llama: DecoderSpec) -> Iterator[Open]:
    opened = []

    def open_(spec: DecoderSpec = llama, **options: int) -> OnnxRuntimeDecoder:
        settings = {"max_sequences": 6, "prefill_chunk": 64, "kv_tokens": 600, "threads": 1, **options}
        opened.append(OnnxRuntimeDecoder(spec, DecoderOptions(**settings)))  # type: ignore[arg-type]  # all are ints
        return opened[-1]

    yield open_
    for decoder in opened:
        decoder.close()


def text(seed: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 96, length)


def alone(decoder: OnnxRuntimeDecoder, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    sequence = decoder.new_sequence()
    logits = decoder.forward([Step(sequence, ids)])[0]
    sequence.close()
    return logits


def prefilled(decoder: OnnxRuntimeDecoder, ids: NDArray[np.int64]) -> DenseSequence[RowKV]:
    sequence = decoder.new_sequence()
    decoder.forward([Step(sequence, ids, rows=0)])
    return sequence


def test_answers_survive_every_shuffle_of_rows(opening: Open) -> None:
    """Random subsets step together, some end, others come: each sequence goes on as if it were alone."""
    decoder, judge = opening(), opening()
    rng = np.random.default_rng(3)
    live: dict[DenseSequence[RowKV], NDArray[np.int64]] = {}
    windows = set()
    for turn in range(40):
        for ended in [sequence for sequence in live if sequence.length > 58]:  # a step of the judge takes 64
            ended.close()
            del live[ended]
        if len(live) > 3 and rng.random() < 0.4:
            ended = list(live)[rng.integers(len(live))]
            ended.close()
            del live[ended]
        while len(live) < (6 if turn == 0 else 3) or (len(live) < 6 and rng.random() < 0.5):
            ids = text(int(rng.integers(1000)), int(rng.integers(3, 30)))
            live[prefilled(decoder, ids)] = ids
        chosen = [list(live)[i] for i in rng.permutation(len(live))[: rng.integers(1, len(live) + 1)]]
        new = [rng.integers(0, 96, rng.choice([1, 1, 2, 5])) for _ in chosen]
        outputs = decoder.forward([Step(sequence, ids) for sequence, ids in zip(chosen, new, strict=True)])
        for sequence, ids, logits in zip(chosen, new, outputs, strict=True):
            live[sequence] = np.concatenate([live[sequence], ids])
            np.testing.assert_allclose(logits, alone(judge, live[sequence]), atol=1e-4)
        decoder.check_integrity()
        windows |= set(decoder._bindings)
    assert len(windows) > 8


def test_an_idle_row_in_the_middle_is_left_as_it_was(opening: Open) -> None:
    decoder = opening()
    texts = [text(i, 9 + i) for i in range(3)]
    sequences = [prefilled(decoder, ids) for ids in texts]
    before = sequences[1].snapshot()
    outputs = decoder.forward([Step(sequences[0], np.array([4])), Step(sequences[2], np.array([5]))])
    assert (0, 3) in decoder._bindings  # one call over all three rows
    after = sequences[1].snapshot()
    for old, new in zip(before.arrays, after.arrays, strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_allclose(outputs[0], alone(decoder, np.append(texts[0], 4)), atol=1e-4)
    np.testing.assert_allclose(outputs[1], alone(decoder, np.append(texts[2], 5)), atol=1e-4)


def test_a_short_step_is_padded_even_at_the_end_of_the_context(opening: Open) -> None:
    """Drafts of other sequences in the same call reach past the last place of the full one."""
    decoder = opening(prefill_chunk=128)
    full, short = prefilled(decoder, text(0, 127)), prefilled(decoder, text(1, 10))
    outputs = decoder.forward([Step(full, np.array([7])), Step(short, text(2, 2), rows=2)])
    assert full.length == 128
    np.testing.assert_allclose(outputs[0], alone(decoder, np.append(text(0, 127), 7)), atol=1e-4)
    np.testing.assert_allclose(outputs[1][-1:], alone(decoder, np.append(text(1, 10), text(2, 2))), atol=1e-4)
    with pytest.raises(ContextOverflow):
        decoder.forward([Step(full, np.array([1]))])


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([1, 1, 1], [[0, 1, 2]]),
        ([1, 200, 1], [[0, 2], [1]]),
        ([3, 5, 4], [[0, 1, 2]]),  # 15 places for 12 tokens
        ([1, 1, 1, 9], [[0, 1, 2], [3]]),  # padded: 36 places for 12 tokens
        ([64, 64], [[0], [1]]),
    ],
)
def test_which_steps_share_a_call(lengths: list[int], groups: list[list[int]]) -> None:
    assert list(_group(lengths, pad=True)) == groups


def test_batch_invariance_pads_nothing() -> None:
    assert list(_group([3, 5, 3], pad=False)) == [[0, 2], [1]]


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back by madvise")
def test_memory_follows_the_tokens_held() -> None:
    """8 rows of 64 MiB: what is resident is what was written."""
    process, megabyte = psutil.Process(), 1 << 20
    before = process.memory_info().rss

    def grown() -> float:
        return (process.memory_info().rss - before) / megabyte

    rows = KVRows(rows=8, heads=[4] * 4, tokens=65536, head_dim=16)
    assert grown() < 4
    rows.buffers[0][3, :, :32768] = 1.0  # 8 MiB
    rows.buffers[3][3, :, :32768] = 1.0
    assert 14 < grown() < 20
    rows.release(3, 8192, 32768)
    assert 2 < grown() < 8
    assert rows.buffers[0][3, 2, 8191, 0] == 1.0
    assert rows.buffers[0][3, 2, 8192, 0] == 0.0
    rows.close()


def test_closed_rows_and_crops_give_memory_back(opening: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = opening()
    given: list[tuple[int, int, int]] = []
    monkeypatch.setattr(decoder._kv, "release", lambda *span: given.append(span))
    sequence = prefilled(decoder, text(0, 60))
    sequence.crop(20)
    sequence.close()
    assert given == [(0, 20, 60), (0, 0, decoder._kv.capacity)]


def test_a_graph_of_fewer_layers_than_the_package_says(llama: DecoderSpec) -> None:
    """The engine's error comes through, though its frames hold the cache that is closed then."""
    decoder = OnnxRuntimeDecoder(replace(llama, num_layers=5), DecoderOptions(threads=1))
    try:
        with pytest.raises(EngineError, match=r"past_key_values\.3") as raised:
            decoder.forward([Step(decoder.new_sequence(), text(0, 1), 1)])
    finally:
        decoder.close()
    assert raised.value.__traceback__ is not None


def test_kv_tokens_lowers_the_context(opening: Open) -> None:
    decoder = opening(kv_tokens=40)
    assert decoder.limits.max_context == decoder.limits.kv_tokens == 40
    sequence = prefilled(decoder, text(0, 40))
    with pytest.raises(ContextOverflow, match="40"):
        decoder.forward([Step(sequence, np.array([1]))])
    with pytest.raises(OutOfKVCache, match=r"1 more .* 40 of 40 are held"):
        decoder.forward([Step(decoder.new_sequence(), np.array([1]))])
    with pytest.raises(OutOfKVCache):
        sequence.fork(1)


def test_foreign_sequences_and_snapshots_are_refused(opening: Open) -> None:
    decoder, other = opening(), opening()
    with pytest.raises(ValueError, match="not an open sequence of this decoder"):
        decoder.forward([Step(other.new_sequence(), np.array([1]))])
    wrong = Snapshot(3, (np.zeros((2, 3, 16), np.float16),) * 6)
    with pytest.raises(EngineError, match="another model"):
        decoder.new_sequence().restore(wrong)
    with pytest.raises(EngineError, match="follow"):
        prefilled(decoder, text(0, 3)).restore(wrong)


def test_longrope_sequences_keep_their_factors(opening: Open, tmp_path: Path) -> None:
    decoder = opening(_spec("phi3-longrope", tmp_path))
    short = decoder.new_sequence(32)
    decoder.forward([Step(short, text(0, 32))])
    with pytest.raises(ContextOverflow, match="32"):
        decoder.forward([Step(short, np.array([1]))])
    assert short.length == 32
    long = decoder.new_sequence(33)
    decoder.forward([Step(long, text(0, 32))])
    fork = long.fork(20)  # of a length that the short factors would hold
    together = decoder.forward([Step(long, np.array([1])), Step(fork, text(0, 32)[20:])])
    decoder.forward([Step(fork, np.array([1]))])
    fork.crop(32)
    np.testing.assert_allclose(decoder.forward([Step(fork, np.array([1]))])[0], together[0], atol=1e-4)


def test_engine_errors_are_translated(llama: DecoderSpec, tmp_path: Path, opening: Open) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"loading .*model.onnx failed") as caught:
        opening(replace(llama, model=tmp_path / "model.onnx"))
    assert caught.value.__cause__ is not None
    decoder = opening(replace(llama, vocab_size=97))  # the graph has 96
    with pytest.raises(EngineError, match="running the model failed"):
        decoder.forward([Step(decoder.new_sequence(), np.array([1]))])


def test_other_types_of_the_cache_are_refused(llama: DecoderSpec) -> None:
    OnnxRuntimeDecoder(llama, DecoderOptions(kv_type="float32")).close()
    with pytest.raises(DeviceUnavailable, match="onnxruntime:cpu keeps keys and values as float32, not int8"):
        OnnxRuntimeDecoder(llama, DecoderOptions(kv_type="int8"))


def test_properties_reach_the_session(llama: DecoderSpec) -> None:
    properties = {"session.set_denormal_as_zero": "1"}
    decoder = OnnxRuntimeDecoder(llama, DecoderOptions(max_sequences=1, threads=1, properties=properties))
    got = decoder._session.get_session_options().get_session_config_entry("session.set_denormal_as_zero")
    decoder.close()
    assert got == "1"


def test_closed_decoder_says_so(opening: Open) -> None:
    decoder = opening()
    sequence = decoder.new_sequence()
    decoder.close()
    decoder.close()
    with pytest.raises(DeviceError, match="closed"):
        decoder.new_sequence()
    with pytest.raises(DeviceError, match="closed"):
        sequence.crop(0)
