"""Every family, on both engines and in CoreML's graphs, against Transformers' fp32 logits (tests/tools)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from devices import Decoder, DecoderOptions, DecoderSequence, Step, open_decoder
from devices.base import Engine
from exporters.network import build
from exporters.onnx_builder import OnnxBuilder
from exporters.onnx_coreml_builder import OnnxCoreMLBuilder
from exporters.openvino_builder import OpenVinoBuilder
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from tests.decoder_spec import decoder_spec

FAMILIES = Path(__file__).parent / "fixtures" / "families"
LENGTHS = (7, 24, 72)
TOLERANCE = 1e-3
BUILDERS: dict[Engine, tuple[Callable[..., Any], str, str]] = {
    "onnxruntime": (OnnxBuilder, "onnxruntime:cpu", "model.onnx"),
    "onnxruntime-coreml": (OnnxCoreMLBuilder, "onnxruntime:coreml-emulated", "model.onnx"),
    "openvino": (OpenVinoBuilder, "openvino:cpu", "openvino_model.xml"),
}
EXACT = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}


@dataclass(frozen=True)
class Case:
    """An open family and what Transformers makes of it."""

    decoder: Decoder
    ids: NDArray[np.int64]
    logits: dict[int, NDArray[np.float32]]
    """Length of the text → logits after each of its tokens. Longrope makes them differ where texts agree."""

    def feed(self, sequence: DecoderSequence, end: int, sizes: Sequence[int] = ()) -> NDArray[np.float32]:
        """Logits of the tokens up to ``end`` that ``sequence`` lacks, in steps of ``sizes`` and then the rest."""
        rows = []
        for size in (*sizes, end):
            part = self.ids[sequence.length : min(sequence.length + size, end)]
            if len(part):
                rows += self.decoder.forward([Step(sequence, part, rows=len(part))])
        return np.concatenate(rows)

    def check(self, got: NDArray[np.float32], length: int, start: int = 0) -> None:
        """``got``: logits of the tokens from ``start`` on of the text of ``length``."""
        expected = self.logits[length][start : start + len(got)]
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


def _cases() -> list[tuple[str, str]]:
    return [(folder.name, engine) for folder in sorted(FAMILIES.iterdir()) for engine in BUILDERS]


@pytest.fixture(scope="module", params=_cases(), ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    family, engine = request.param
    checkpoint = SafetensorsCheckpoint(FAMILIES / family)
    arch = checkpoint.architecture
    folder = tmp_path_factory.mktemp(family)
    builder, device, file = BUILDERS[engine]
    graph = builder(arch, "fp32", folder)
    build(checkpoint, graph)
    graph.save(folder)
    spec = decoder_spec(arch, engine, folder / file)
    options = DecoderOptions(
        max_sequences=4,
        prefill_chunk=96,
        kv_tokens=512,
        threads=2,
        properties=EXACT if engine == "openvino" else {},
    )
    decoder = open_decoder(spec, device, options)
    with np.load(FAMILIES / family / "reference.npz") as arrays:
        logits = {length: arrays[f"logits_{length}"] for length in LENGTHS}
        yield Case(decoder, arrays["ids"].astype(np.int64), logits)
    decoder.check_integrity()
    decoder.close()


@pytest.mark.parametrize("length", LENGTHS)
def test_one_call(case: Case, length: int) -> None:
    sequence = case.decoder.new_sequence(length)
    case.check(case.feed(sequence, length), length)
    sequence.close()


@pytest.mark.parametrize("length", LENGTHS)
def test_chunked(case: Case, length: int) -> None:
    sequence = case.decoder.new_sequence(length)
    case.check(case.feed(sequence, length, sizes=(1, 3, 1, 17, 1, 1, 30)), length)
    sequence.close()


def test_ragged_batch(case: Case) -> None:
    """A prompt, a chunk behind 20 tokens and a single token behind 40, in one call, and decoding after it."""
    starts, steps = {7: 0, 24: 20, 72: 40}, {7: 6, 24: 3, 72: 1}
    sequences = {length: case.decoder.new_sequence(length) for length in LENGTHS}
    for length, start in starts.items():
        if start:
            case.feed(sequences[length], start)
    while steps:
        batch = []
        for length, count in steps.items():
            held = sequences[length].length
            batch.append(Step(sequences[length], case.ids[held : held + count], rows=count))
        outputs = case.decoder.forward(batch)
        for (length, count), got in zip(steps.items(), outputs, strict=True):
            case.check(got, length, sequences[length].length - count)
        steps = {length: 1 for length in LENGTHS if sequences[length].length < length}
    for sequence in sequences.values():
        sequence.close()


def test_after_crop(case: Case) -> None:
    sequence = case.decoder.new_sequence(72)
    case.feed(sequence, 60)
    kept = sequence.crop(35)
    case.check(case.feed(sequence, 72, sizes=(1, 20)), 72, kept)
    kept = sequence.crop(0)
    case.check(case.feed(sequence, 72), 72, kept)
    sequence.close()


def test_after_fork(case: Case) -> None:
    """The fork goes its way while the first, fed with other tokens, goes another."""
    first = case.decoder.new_sequence(72)
    case.feed(first, 50)
    fork = first.fork(41)
    case.decoder.forward([Step(first, case.ids[::-1][:9].copy())])
    first.crop(45)
    case.check(case.feed(fork, 72, sizes=(1, 1)), 72, 41)
    case.check(case.feed(first, 72, sizes=(5,)), 72, 45)
    first.close()
    fork.close()
