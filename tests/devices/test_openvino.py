"""What is particular to OpenVINO; the contract is in test_contract.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from devices.base import Decoder, DecoderOptions, DecoderSpec, Snapshot, Step
from devices.errors import ContextOverflow, DeviceError, DeviceUnavailable, EngineError, OutOfKVCache, OutOfSequences
from devices.kv_types import KVType
from devices.openvino_dense import OpenVinoDenseDecoder
from devices.openvino_import import import_openvino
from devices.openvino_open import open_openvino
from devices.openvino_paged import OpenVinoDecoder
from exporters.network import build
from exporters.openvino_builder import OpenVinoBuilder
from tests.decoder_spec import decoder_spec
from tests.exporters.random_checkpoint import ARCHITECTURE, RandomCheckpoint

BLOCK = 32
"""Tokens in a block of the CPU plugin."""


def exported(folder: Path, checkpoint: RandomCheckpoint) -> DecoderSpec:
    builder = OpenVinoBuilder(checkpoint.architecture, "fp32", folder)
    build(checkpoint, builder)
    builder.save(folder)
    arch = checkpoint.architecture
    return decoder_spec(arch, "openvino", folder / "openvino_model.xml")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    return exported(tmp_path_factory.mktemp("paged"), RandomCheckpoint(ARCHITECTURE))


@pytest.fixture
def decoder(spec: DecoderSpec) -> Iterator[OpenVinoDecoder]:
    opened = OpenVinoDecoder(spec, DecoderOptions(max_sequences=4, kv_tokens=8 * BLOCK, threads=1))
    yield opened
    opened.close()


@pytest.fixture
def dense(tmp_path: Path) -> Iterator[Decoder]:
    capped = exported(tmp_path, RandomCheckpoint(replace(ARCHITECTURE, attention_softcap=5.0)))
    opened = open_openvino(capped, DecoderOptions(max_sequences=3, kv_tokens=100, prefill_chunk=64, threads=1))
    assert isinstance(opened, OpenVinoDenseDecoder)
    yield opened
    opened.check_integrity()
    opened.close()


def ids(length: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, ARCHITECTURE.vocab_size, length)


def alone(decoder: Decoder, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    sequence = decoder.new_sequence()
    (logits,) = decoder.forward([Step(sequence, tokens, len(tokens))])
    sequence.close()
    return logits


class TestPaged:
    def test_a_mixed_batch_is_one_inference(self, decoder: OpenVinoDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        request = decoder._request

        class Counting:
            def __getattr__(self, name: str) -> Any:
                return getattr(request, name)

            def infer(self) -> Any:
                calls.append(1)
                return request.infer()

        a, b = decoder.new_sequence(), decoder.new_sequence()
        decoder.forward([Step(a, ids(9))])
        monkeypatch.setattr(decoder, "_request", Counting())
        rows = decoder.forward([Step(a, ids(1)), Step(b, ids(40), 0)])
        assert calls == [1]
        assert [len(row) for row in rows] == [1, 0]

    def test_forks_share_their_blocks(self, decoder: OpenVinoDecoder) -> None:
        parent = decoder.new_sequence()
        decoder.forward([Step(parent, ids(3 * BLOCK + 5))])
        pool = decoder.pools[0].blocks
        free = pool.free_blocks
        child = parent.fork(2 * BLOCK + 7)
        assert pool.free_blocks == free
        assert child.table.blocks == parent.table.blocks[:3]
        decoder.forward([Step(child, ids(1))])
        assert pool.free_blocks == free - 1  # the partial block was copied, the others are still shared
        assert child.table.blocks[:2] == parent.table.blocks[:2]

    def test_the_pool_is_kv_tokens_in_whole_blocks(self, spec: DecoderSpec) -> None:
        decoder = OpenVinoDecoder(spec, DecoderOptions(kv_tokens=BLOCK + 1, threads=1))
        assert decoder.limits.kv_tokens == 2 * BLOCK
        full = decoder.new_sequence()
        decoder.forward([Step(full, ids(2 * BLOCK))])
        with pytest.raises(OutOfKVCache, match="0 of 2 are free"):
            decoder.forward([Step(full, ids(1))])
        assert full.length == 2 * BLOCK
        decoder.close()

    def test_fp32_exports_are_not_rounded(self, decoder: OpenVinoDecoder) -> None:
        assert {cache.dtype for cache in decoder.caches} == {np.dtype(np.float32)}

    def test_no_compile_cache_is_written_that_cannot_be_read(self, spec: DecoderSpec, tmp_path: Path) -> None:
        OpenVinoDecoder(spec, DecoderOptions(kv_tokens=BLOCK, threads=1, cache_dir=tmp_path)).close()
        assert not list(tmp_path.iterdir())

    def test_properties_are_passed_on(self, spec: DecoderSpec) -> None:
        options = DecoderOptions(kv_tokens=BLOCK, threads=1, properties={"KV_CACHE_PRECISION": "u8"})
        decoder = OpenVinoDecoder(spec, options)
        assert {cache.dtype for cache in decoder.caches} == {np.dtype(np.uint8)}
        decoder.close()

    @pytest.mark.parametrize(
        ("kv_type", "stored"), [("float32", np.float32), ("float16", np.float16), ("int8", np.uint8)]
    )
    def test_types_of_the_cache(self, spec: DecoderSpec, kv_type: KVType, stored: type[np.generic]) -> None:
        decoder = OpenVinoDecoder(spec, DecoderOptions(kv_tokens=BLOCK, threads=1, kv_type=kv_type))
        assert {cache.dtype for cache in decoder.caches} == {np.dtype(stored)}
        (logits,) = decoder.forward([Step(decoder.new_sequence(), ids(3))])
        assert np.isfinite(logits).all()
        decoder.close()

    def test_types_that_it_cannot_keep(self, spec: DecoderSpec) -> None:
        options = DecoderOptions(kv_tokens=BLOCK, threads=1, kv_type="int8", batch_invariant=True)
        with pytest.raises(DeviceUnavailable, match=r"batch invariance keeps .* as float16 or float32, not int8"):
            OpenVinoDecoder(spec, options)
        with pytest.raises(DeviceUnavailable, match=r"openvino:cpu keeps .*, not bits"):
            OpenVinoDecoder(spec, replace(options, kv_type=cast(KVType, "bits")))

    def test_an_unknown_property_is_an_engine_error(self, spec: DecoderSpec) -> None:
        with pytest.raises(EngineError, match="compiling for CPU") as caught:
            OpenVinoDecoder(spec, DecoderOptions(properties={"NO_SUCH_PROPERTY": "1"}))
        assert caught.value.__cause__ is not None

    def test_a_snapshot_of_another_precision_is_refused(self, decoder: OpenVinoDecoder) -> None:
        sequence = decoder.new_sequence()
        decoder.forward([Step(sequence, ids(5))])
        taken = sequence.snapshot()
        other = Snapshot(taken.length, tuple(array.astype(np.float16) for array in taken.arrays))
        fresh = decoder.new_sequence()
        with pytest.raises(EngineError, match="another KV precision"):
            fresh.restore(other)
        assert fresh.length == 0
        with pytest.raises(EngineError, match="does not follow on the 5 tokens"):
            sequence.restore(taken)

    def test_a_sequence_of_another_decoder_is_refused(self, decoder: OpenVinoDecoder, spec: DecoderSpec) -> None:
        other = OpenVinoDecoder(spec, DecoderOptions(kv_tokens=BLOCK, threads=1))
        stranger = other.new_sequence()
        with pytest.raises(ValueError, match="not an open sequence of this decoder"):
            decoder.forward([Step(stranger, ids(1))])
        other.close()

    def test_a_damaged_model_is_an_engine_error(self, spec: DecoderSpec, tmp_path: Path) -> None:
        broken = tmp_path / "openvino_model.xml"
        broken.write_bytes(spec.model.read_bytes()[:5000] + b"ScaledDotProductAttention")
        with pytest.raises(EngineError, match="reading"):
            open_openvino(replace(spec, model=broken), DecoderOptions())
        with pytest.raises(EngineError, match="cannot read"):
            open_openvino(replace(spec, model=tmp_path / "missing.xml"), DecoderOptions())

    def test_a_wrong_layer_count_is_named(self, spec: DecoderSpec) -> None:
        with pytest.raises(EngineError, match="attention layers"):
            OpenVinoDecoder(replace(spec, num_layers=spec.num_layers + 1), DecoderOptions())


class TestRopeSwitch:
    SWITCH = 24

    @pytest.fixture
    def decoder(self, tmp_path: Path) -> Iterator[Decoder]:
        short = ARCHITECTURE.layers[0].rope
        assert short is not None
        long = replace(short, long_inv_freq=tuple(f / 3 for f in short.inv_freq), long_scale=1.2)
        layers = tuple(replace(layer, rope=long) for layer in ARCHITECTURE.layers)
        arch = replace(ARCHITECTURE, layers=layers, rope_switch=self.SWITCH)
        opened = open_openvino(exported(tmp_path, RandomCheckpoint(arch)), DecoderOptions(kv_tokens=256, threads=1))
        yield opened
        opened.close()

    def test_the_factors_are_those_of_the_expected_length(self, decoder: Decoder) -> None:
        tokens = ids(20)
        short, long = decoder.new_sequence(self.SWITCH), decoder.new_sequence(self.SWITCH + 1)
        together = decoder.forward([Step(short, tokens, 20), Step(long, tokens, 20)])
        assert np.abs(together[0] - together[1]).max() > 1e-2
        np.testing.assert_allclose(together[0], alone(decoder, tokens), atol=1e-5)

    def test_short_sequences_stop_at_the_switch(self, decoder: Decoder) -> None:
        sequence = decoder.new_sequence(self.SWITCH)
        decoder.forward([Step(sequence, ids(self.SWITCH))])
        with pytest.raises(ContextOverflow, match="expected=25"):
            decoder.forward([Step(sequence, ids(1))])
        assert sequence.length == self.SWITCH

    def test_forks_stay_on_their_factors(self, decoder: Decoder) -> None:
        tokens = ids(30)
        whole = decoder.new_sequence(30)
        (expected,) = decoder.forward([Step(whole, tokens, 30)])
        fork = whole.fork(22)
        (logits,) = decoder.forward([Step(fork, tokens[22:], 8)])
        np.testing.assert_allclose(logits, expected[22:], atol=1e-5)


class TestDense:
    def test_chunks_forks_and_crops_agree_with_one_call(self, dense: Decoder) -> None:
        tokens = ids(30)
        expected = alone(dense, tokens)
        sequence = dense.new_sequence()
        (first,) = dense.forward([Step(sequence, tokens[:20], 3)])
        np.testing.assert_allclose(first, expected[17:20], atol=1e-4)
        fork = sequence.fork(12)
        assert sequence.crop(15) == 15
        parts = dense.forward([Step(sequence, tokens[15:], 15), Step(fork, tokens[12:], 18)])
        np.testing.assert_allclose(parts[0], expected[15:], atol=1e-4)
        np.testing.assert_allclose(parts[1], expected[12:], atol=1e-4)
        sequence.close()
        fork.close()

    def test_snapshots_come_back(self, dense: Decoder) -> None:
        tokens = ids(12)
        expected = alone(dense, tokens)
        sequence = dense.new_sequence()
        dense.forward([Step(sequence, tokens[:8], 0)])
        taken = sequence.snapshot()
        assert taken is not None
        dense.forward([Step(sequence, ids(4, seed=9))])
        sequence.close()
        fresh = dense.new_sequence()  # on the request of the closed one
        fresh.restore(taken)
        (logits,) = dense.forward([Step(fresh, tokens[8:], 4)])
        np.testing.assert_allclose(logits, expected[8:], atol=1e-4)
        fresh.close()

    def test_no_tokens_and_no_rows(self, dense: Decoder) -> None:
        sequence = dense.new_sequence()
        empty = sequence.fork(0)
        assert (empty.length, sequence.crop(0)) == (0, 0)
        (none,) = dense.forward([Step(empty, ids(5), 0)])
        assert none.shape == (0, ARCHITECTURE.vocab_size)
        assert empty.crop(0) == 0
        np.testing.assert_allclose(dense.forward([Step(empty, ids(3), 3)])[0], alone(dense, ids(3)), atol=1e-5)
        empty.close()
        sequence.close()

    def test_limits_hold(self, dense: Decoder) -> None:
        sequences = [dense.new_sequence() for _ in range(3)]
        with pytest.raises(OutOfSequences):
            dense.new_sequence()
        dense.forward([Step(sequence, ids(30)) for sequence in sequences])
        with pytest.raises(OutOfKVCache, match="90 of 100"):
            dense.forward([Step(sequence, ids(4)) for sequence in sequences])
        sequences[0].close()
        dense.forward([Step(sequence, ids(10)) for sequence in sequences[1:]])
        with pytest.raises(OutOfKVCache, match="80 of 100"):
            sequences[1].fork(30)
        assert [sequence.length for sequence in sequences[1:]] == [40, 40]
        dense.new_sequence().close()  # the refused fork took no place

    def test_closed_things_say_so(self, dense: Decoder) -> None:
        sequence, other = dense.new_sequence(), dense.new_sequence()
        sequence.close()
        sequence.close()
        with pytest.raises(DeviceError, match="closed"):
            sequence.crop(0)
        dense.close()
        with pytest.raises(DeviceError, match="closed"):
            other.crop(0)
        with pytest.raises(DeviceError, match="closed"):
            dense.new_sequence()
        other.close()


def test_importing_openvino_reports_to_nobody() -> None:
    code = (
        "import sys; from devices.openvino_import import import_openvino; import_openvino(); "
        "assert 'openvino' in sys.modules; print([m for m in sys.modules if m.startswith('openvino_telemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_npu_plugins_decoder_gives_the_same_tokens(spec: DecoderSpec, decoder: OpenVinoDecoder) -> None:
    """NPUW, the NPU plugin's way with language models, runs on the CPU too; it compiles the same stateful file."""
    ov = import_openvino()
    core = ov.Core()
    properties = {
        "NPU_USE_NPUW": "YES",
        "NPUW_DEVICES": "CPU",
        "NPUW_LLM": "YES",
        "NPUW_LLM_BATCH_DIM": 0,
        "NPUW_LLM_SEQ_LEN_DIM": 2,
        "NPUW_LLM_MAX_PROMPT_LEN": 64,
        "NPUW_LLM_MIN_RESPONSE_LEN": 32,
        "INFERENCE_PRECISION_HINT": "f32",  # of the CPU below; its bf16 would turn near ties
    }
    request = core.compile_model(str(spec.model), "NPU", properties).create_infer_request()
    prompt = ids(20, seed=3)
    sequence = decoder.new_sequence()
    (logits,) = decoder.forward([Step(sequence, prompt)])
    fed, length, tokens = prompt, 0, []
    for _ in range(12):
        end = length + len(fed)
        request.infer(
            {
                "input_ids": fed[None],
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(length, end)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        token = int(logits[-1].argmax())
        theirs = request.get_tensor("logits").data[0, -1]
        np.testing.assert_allclose(theirs, logits[-1], atol=0.05)  # its KV cache is f16
        assert int(theirs.argmax()) == token
        tokens.append(token)
        fed, length = np.array([token]), end
        (logits,) = decoder.forward([Step(sequence, fed)])
    assert len(set(tokens)) > 3  # not one token over and over
