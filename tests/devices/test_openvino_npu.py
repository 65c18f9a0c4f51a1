"""What is particular to NPUW, on the CPU in an NPU's place; the contract is in test_contract.py."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from devices import open_decoder
from devices.base import DecoderOptions, DecoderSpec, Snapshot, Step
from devices.discovery import probe_device
from devices.errors import ContextOverflow, DeviceUnavailable, EngineError, OutOfSequences
from devices.names import ALIASES
from devices.openvino_npu import NpuSequence, OpenVinoNpuDecoder
from devices.openvino_npuw import PROMPT, RESPONSE, NpuwRequest, StaticShapes, static_shapes
from exporters.architecture import Architecture, Rope
from exporters.checkpoint import Checkpoint
from exporters.graphs import write_graph
from exporters.network import build
from exporters.npu_weights import NpuCheckpoint
from exporters.onnx_operators import WeightFormat
from tests.decoder_spec import decoder_spec
from tests.exporters.numpy_builder import NumpyBuilder
from tests.exporters.random_checkpoint import ARCHITECTURE, ROPE, RandomCheckpoint

TOLERANCE = 0.03
"""The KV cache is float16, and so are sums of what is multiplied by 4-bit weights; logits reach 12."""
OPTIONS = DecoderOptions(max_prompt=128, prefill_chunk=32, threads=2)
IDS = np.random.default_rng(1).integers(0, ARCHITECTURE.vocab_size, 150)


def exported(checkpoint: Checkpoint, folder: Path, weights: WeightFormat = "fp16") -> DecoderSpec:
    engine, file = write_graph(checkpoint, "openvino-npu", weights, folder, folder)
    arch = checkpoint.architecture
    return decoder_spec(arch, engine, folder / file)


def twin(checkpoint: Checkpoint) -> NDArray[np.float64]:
    """Logits after each of IDS, in float64."""
    builder = NumpyBuilder(IDS)
    build(checkpoint, builder)
    assert builder.logits is not None
    return builder.logits


def fed(decoder: OpenVinoNpuDecoder, sequence: NpuSequence, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """(vocab,) after the last of ``tokens``, in steps as a scheduler makes them."""
    chunk = decoder.limits.prefill_chunk
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        (rows,) = decoder.forward([Step(sequence, piece, int(start + chunk >= len(tokens)))])
    return rows[0]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    return exported(NpuCheckpoint(RandomCheckpoint(ARCHITECTURE), "fp16"), tmp_path_factory.mktemp("npu"))


@pytest.fixture(scope="module")
def expected() -> NDArray[np.float64]:
    return twin(NpuCheckpoint(RandomCheckpoint(ARCHITECTURE), "fp16"))


@pytest.fixture(scope="module")
def opened(spec: DecoderSpec) -> Iterator[OpenVinoNpuDecoder]:
    decoder = OpenVinoNpuDecoder(spec, OPTIONS, emulated=True)
    yield decoder
    decoder.close()


@pytest.fixture
def sequence(opened: OpenVinoNpuDecoder) -> Iterator[NpuSequence]:
    sequence = opened.new_sequence()
    yield sequence
    opened.check_integrity()
    sequence.close()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(start, tokens) of each call of the device."""
    made: list[tuple[int, int]] = []
    infer = NpuwRequest._infer

    def counted(self: NpuwRequest, tokens: Any, start: int, dropped: int = 0) -> NDArray[np.float32]:
        made.append((start, len(tokens)))
        return infer(self, tokens, start, dropped)

    monkeypatch.setattr(NpuwRequest, "_infer", counted)
    return made


def close(a: NDArray[np.float32], b: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)


class TestNumbers:
    WINDOWS = tuple(replace(layer, sliding_window=20) for layer in ARCHITECTURE.layers)
    MIXED = tuple(replace(layer, sliding_window=20 if i % 2 else None) for i, layer in enumerate(ARCHITECTURE.layers))
    INTERLEAVED = tuple(replace(layer, rope=Rope(ROPE.inv_freq[:4], 1.1, True)) for layer in ARCHITECTURE.layers)

    @pytest.mark.parametrize("weights", ["fp16", "int4"])
    @pytest.mark.parametrize(
        "architecture",
        [
            ARCHITECTURE,
            replace(ARCHITECTURE, tied_head=True, hidden_size=128, intermediate_size=192),
            replace(ARCHITECTURE, layers=WINDOWS),
            replace(ARCHITECTURE, layers=MIXED),
            replace(ARCHITECTURE, layers=INTERLEAVED),
            replace(ARCHITECTURE, attention_softcap=5.0, logit_softcap=9.0),
            replace(ARCHITECTURE, qkv_bias=True, qk_norm=True, post_norms=True, logit_scale=0.5),
            replace(ARCHITECTURE, layers=ARCHITECTURE.layers[:2]),
        ],
        ids=["plain", "tied", "windows", "mixed windows", "interleaved", "soft caps", "norms", "few layers"],
    )
    def test_read_appended_and_continued(
        self, architecture: Architecture, weights: WeightFormat, tmp_path: Path
    ) -> None:
        checkpoint = NpuCheckpoint(RandomCheckpoint(architecture), weights)
        logits = twin(checkpoint)
        decoder = OpenVinoNpuDecoder(exported(checkpoint, tmp_path, weights), OPTIONS, emulated=True)
        sequence = decoder.new_sequence()
        close(fed(decoder, sequence, IDS[:70]), logits[69])
        close(decoder.forward([Step(sequence, IDS[70:75], 5)])[0], logits[70:75])
        close(fed(decoder, sequence, IDS[75:110]), logits[109])
        close(decoder.forward([Step(sequence, IDS[110:112], 2)])[0], logits[110:112])
        decoder.close()

    @pytest.mark.parametrize("rows", [0, 1, 2, 20, 32])
    def test_rows(
        self, opened: OpenVinoNpuDecoder, sequence: NpuSequence, expected: NDArray[np.float64], rows: int
    ) -> None:
        fed(opened, sequence, IDS[:20])
        (logits,) = opened.forward([Step(sequence, IDS[20:52], rows)])
        assert logits.shape == (rows, ARCHITECTURE.vocab_size)
        close(logits, expected[52 - rows : 52])

    @pytest.mark.parametrize("appended", [0, 1, 12])
    @pytest.mark.parametrize("kept", [0, 1, 32, 60, 70])
    @pytest.mark.parametrize("more", [1, 30])
    def test_dropped_tokens_leave_no_trace(
        self,
        opened: OpenVinoNpuDecoder,
        sequence: NpuSequence,
        expected: NDArray[np.float64],
        appended: int,
        kept: int,
        more: int,
    ) -> None:
        fed(opened, sequence, np.concatenate([IDS[:kept], IDS[:70][::-1]])[:70])
        if appended:
            opened.forward([Step(sequence, IDS[:appended], appended)])
        assert sequence.crop(kept) == kept
        close(fed(opened, sequence, IDS[kept : kept + more]), expected[kept + more - 1])
        close(opened.forward([Step(sequence, IDS[kept + more :][:3], 3)])[0], expected[kept + more :][:3])

    def test_up_to_the_end_of_the_context(self, spec: DecoderSpec, expected: NDArray[np.float64]) -> None:
        decoder = OpenVinoNpuDecoder(replace(spec, max_context=len(IDS)), OPTIONS, emulated=True)
        assert decoder.limits.max_context == decoder.limits.kv_tokens == len(IDS)
        sequence = decoder.new_sequence()
        close(fed(decoder, sequence, IDS[:128]), expected[127])
        close(fed(decoder, sequence, IDS[128:]), expected[-1])
        with pytest.raises(ContextOverflow, match="150"):
            decoder.forward([Step(sequence, IDS[:1])])
        sequence.crop(140)
        close(fed(decoder, sequence, IDS[140:]), expected[-1])
        decoder.close()

    def test_answers_that_begin_short_and_grow_long(self, spec: DecoderSpec) -> None:
        """NPUW has smaller caches for them where prompts may be longer than 1,024, and errs when it leaves one."""
        options = replace(OPTIONS, max_prompt=1088, kv_tokens=1140)
        ids = np.random.default_rng(2).integers(0, ARCHITECTURE.vocab_size, 1120)
        decoder = OpenVinoNpuDecoder(replace(spec, max_context=2048), options, emulated=True)
        sequence = decoder.new_sequence()
        for start in range(0, len(ids), 4):
            (logits,) = decoder.forward([Step(sequence, ids[start : start + 4])])
        builder = NumpyBuilder(ids)
        build(NpuCheckpoint(RandomCheckpoint(ARCHITECTURE), "fp16"), builder)
        assert builder.logits is not None
        close(logits[0], builder.logits[-1])
        decoder.close()

    def test_beyond_the_longest_prompt_tokens_are_appended(
        self,
        opened: OpenVinoNpuDecoder,
        sequence: NpuSequence,
        expected: NDArray[np.float64],
        calls: list[tuple[int, int]],
    ) -> None:
        close(fed(opened, sequence, IDS), expected[-1])
        assert calls == [(0, 128), *((place, 1) for place in range(128, 150))]


class TestPrefixes:
    def test_a_prompt_is_one_call(
        self, opened: OpenVinoNpuDecoder, sequence: NpuSequence, calls: list[tuple[int, int]]
    ) -> None:
        fed(opened, sequence, IDS[:100])
        assert calls == [(0, 100)]

    def test_the_next_turn_of_a_chat(
        self, opened: OpenVinoNpuDecoder, sequence: NpuSequence, calls: list[tuple[int, int]]
    ) -> None:
        """Of the first prompt the whole chunks are kept; its rest, the answer and what is new are read."""
        fed(opened, sequence, IDS[:70])
        for token in IDS[70:80]:
            opened.forward([Step(sequence, np.array([token]))])
        calls.clear()
        fed(opened, sequence, IDS[80:120])
        assert calls == [(64, 56)]
        calls.clear()
        sequence.crop(100)
        fed(opened, sequence, IDS[100:125])
        assert calls == [(120, 1), (96, 29)]  # the first only has NPUW move its cache to where it can be cut

    def test_few_tokens_are_appended(
        self, opened: OpenVinoNpuDecoder, sequence: NpuSequence, calls: list[tuple[int, int]]
    ) -> None:
        fed(opened, sequence, IDS[:70])
        fed(opened, sequence, IDS[70:71])
        calls.clear()
        sequence.crop(68)
        fed(opened, sequence, IDS[68:76])
        assert calls == [(place, 1) for place in range(68, 76)]

    def test_a_new_sequence_begins_anew(
        self, opened: OpenVinoNpuDecoder, calls: list[tuple[int, int]], expected: NDArray[np.float64]
    ) -> None:
        for _ in range(2):
            sequence = opened.new_sequence()
            close(fed(opened, sequence, IDS[:40]), expected[39])
            sequence.close()
        assert calls == [(0, 40)] * 2

    def test_what_one_sequence_cannot_do(self, opened: OpenVinoNpuDecoder, sequence: NpuSequence) -> None:
        fed(opened, sequence, IDS[:10])
        with pytest.raises(OutOfSequences, match="holds one sequence"):
            sequence.fork(5)
        with pytest.raises(OutOfSequences, match="1 sequences are open"):
            opened.new_sequence()
        assert sequence.snapshot() is None
        with pytest.raises(EngineError, match="does not follow"):
            sequence.restore(Snapshot(5, ()))
        with pytest.raises(EngineError, match="takes no snapshots; prefill instead"):
            sequence.restore(Snapshot(5, (), 10))
        assert sequence.length == 10


class TestShapes:
    @pytest.mark.parametrize(
        ("options", "shapes"),
        [
            (DecoderOptions(), StaticShapes(PROMPT, PROMPT + RESPONSE, 256)),
            (DecoderOptions(max_prompt=2000), StaticShapes(2000, 2000 + RESPONSE, 256)),
            (DecoderOptions(max_prompt=10**6), StaticShapes(4095, 4096, 256)),
            (DecoderOptions(kv_tokens=700), StaticShapes(699, 700, 256)),
            (DecoderOptions(kv_tokens=10**6), StaticShapes(PROMPT, PROMPT + RESPONSE, 256)),
            (DecoderOptions(max_prompt=100, prefill_chunk=100), StaticShapes(100, 100 + RESPONSE, 32)),
            (DecoderOptions(kv_tokens=1), StaticShapes(1, 1, 16)),
        ],
    )
    def test_within_the_model_and_what_is_asked(
        self, spec: DecoderSpec, options: DecoderOptions, shapes: StaticShapes
    ) -> None:
        assert static_shapes(replace(spec, max_context=4096), options) == shapes
        compiled = {name: int(value) for name, value in shapes.properties().items() if value.isdecimal()}
        prompt, response = compiled["NPUW_LLM_MAX_PROMPT_LEN"], compiled["NPUW_LLM_MIN_RESPONSE_LEN"]
        assert prompt >= shapes.max_prompt
        assert prompt + response > shapes.max_context
        assert prompt % shapes.chunk == 0
        assert prompt > shapes.chunk  # else nothing of a prompt can be kept

    def test_only_the_short_factors_of_longrope(self, spec: DecoderSpec) -> None:
        assert static_shapes(replace(spec, rope_switch=300), DecoderOptions()).max_context == 300

    @pytest.mark.parametrize("options", [DecoderOptions(max_prompt=0), DecoderOptions(kv_tokens=-1)])
    def test_nothing_is_no_size(self, spec: DecoderSpec, options: DecoderOptions) -> None:
        with pytest.raises(ValueError, match="must be at least 1, not"):
            static_shapes(spec, options)


class TestOpening:
    def test_only_by_its_full_name(self, spec: DecoderSpec) -> None:
        assert not any("openvino:npu-emulated" in names for names in ALIASES.values())
        device = probe_device("openvino:npu-emulated")
        assert device.ready
        assert device.hardware.startswith("emulated")
        decoder = open_decoder(spec, "openvino:npu-emulated", OPTIONS)
        assert decoder.device == "openvino:npu-emulated"
        assert (decoder.limits.max_sequences, decoder.limits.max_prompt) == (1, 128)
        decoder.close()

    def test_an_npu_that_is_not_here(self, spec: DecoderSpec) -> None:
        if probe_device("openvino:npu").ready:
            pytest.skip("there is one")
        with pytest.raises(DeviceUnavailable, match=r"finds no NPU here; install the Intel NPU driver, or use"):
            open_decoder(spec, "npu", OPTIONS)

    def test_other_types_of_cache(self, spec: DecoderSpec) -> None:
        with pytest.raises(DeviceUnavailable, match="keeps keys and values as float16, not int8"):
            OpenVinoNpuDecoder(spec, replace(OPTIONS, kv_type="int8"), emulated=True)

    @pytest.mark.parametrize("cached", [False, True])
    def test_a_file_that_is_not_there(self, spec: DecoderSpec, cached: bool, tmp_path: Path) -> None:
        options = replace(OPTIONS, cache_dir=tmp_path if cached else None)
        with pytest.raises(EngineError, match=r"gone\.xml"):
            OpenVinoNpuDecoder(replace(spec, model=tmp_path / "gone.xml"), options, emulated=True)

    def test_other_threads_go_on_meanwhile(self, spec: DecoderSpec) -> None:
        """As must whoever answers while an NPU compiles."""
        longest, last, done = 0.0, time.perf_counter(), threading.Event()

        def watch() -> None:
            nonlocal longest, last
            while not done.wait(0.001):
                now = time.perf_counter()
                longest, last = max(longest, now - last), now

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        OpenVinoNpuDecoder(spec, OPTIONS, emulated=True).close()
        took = time.perf_counter() - started
        done.set()
        watcher.join()
        assert longest < took / 2

    def test_a_failure_is_over_with_the_sequence(
        self, opened: OpenVinoNpuDecoder, monkeypatch: pytest.MonkeyPatch, expected: NDArray[np.float64]
    ) -> None:
        class Failing:
            def set_tensor(self, *given: object) -> None:
                raise RuntimeError("ZE_RESULT_ERROR_DEVICE_LOST")

        sequence = opened.new_sequence()
        fed(opened, sequence, IDS[:40])
        with monkeypatch.context() as patch:
            patch.setattr(opened._request, "_request", Failing())
            with pytest.raises(EngineError, match="failed running a step: ZE_RESULT_ERROR_DEVICE_LOST"):
                fed(opened, sequence, IDS[40:60])
        sequence.close()
        again = opened.new_sequence()
        close(fed(opened, again, IDS[:60]), expected[59])
        again.close()


class TestCompileCache:
    def test_what_is_imported_computes_the_same(
        self, spec: DecoderSpec, opened: OpenVinoNpuDecoder, sequence: NpuSequence, tmp_path: Path
    ) -> None:
        options = replace(OPTIONS, cache_dir=tmp_path)
        whole = fed(opened, sequence, IDS[:70])
        turn = fed(opened, sequence, IDS[70:110])
        for _ in ("compiled", "imported"):
            decoder = OpenVinoNpuDecoder(spec, options, emulated=True)
            other = decoder.new_sequence()
            assert np.array_equal(fed(decoder, other, IDS[:70]), whole)
            assert np.array_equal(fed(decoder, other, IDS[70:110]), turn)
            decoder.close()
        assert len(list(tmp_path.iterdir())) == 1

    def test_it_is_imported_not_compiled(
        self, spec: DecoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        options = replace(OPTIONS, cache_dir=tmp_path)
        OpenVinoNpuDecoder(spec, options, emulated=True).close()

        def refuse(core: object, path: Path) -> None:
            raise EngineError(f"{path} is compiled again")

        monkeypatch.setattr("devices.openvino_npuw.read_model", refuse)
        OpenVinoNpuDecoder(spec, options, emulated=True).close()
        with pytest.raises(EngineError, match="is compiled again"):
            OpenVinoNpuDecoder(spec, replace(options, max_prompt=192), emulated=True)
        (blob,) = tmp_path.iterdir()
        blob.write_bytes(blob.read_bytes()[:-1])
        with caplog.at_level(logging.WARNING), pytest.raises(EngineError, match="is compiled again"):
            OpenVinoNpuDecoder(spec, options, emulated=True)
        assert "is damaged and is compiled anew" in caplog.text
