"""What was timed is kept, only for what it speaks of, and never in the way."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
import pytest

from devices.base import DecoderOptions
from edge_runtime.errors import NotMeasured, StorageError
from edge_runtime.machine import fingerprint
from edge_runtime.package import FileEntry, Variant
from edge_runtime.paths import Home
from edge_runtime.timing.observations import (
    KEPT_EACH,
    LARGEST,
    EachToken,
    FirstToken,
    Observations,
    Subject,
    TimedRun,
    merged,
)
from edge_runtime.timing.predict import timing_model
from tests.timing.known import CHUNK, observed

HERE = "a processor, 2 cores"
VARIANT = Variant("onnx-int4", "onnxruntime", "int4", "a/model.onnx", (FileEntry("a/model.onnx", 3, "0" * 64),))
SUBJECT = Subject.of(VARIANT, "onnxruntime:cpu", DecoderOptions(), HERE)


def run(subject: Subject = SUBJECT, created: str = "1") -> TimedRun:
    return TimedRun(subject=subject, chunk=CHUNK, created=created, observations=observed())


@pytest.fixture
def kept(tmp_path: Path) -> Observations:
    return Observations(tmp_path / "cache" / "timing.json")


def test_what_is_kept_comes_back(kept: Observations) -> None:
    assert kept.of(SUBJECT) == []
    kept.keep(run())
    assert kept.of(SUBJECT) == [run()]


@pytest.mark.parametrize(
    "other",
    [
        Subject.of(VARIANT, "openvino:cpu", DecoderOptions(), HERE),
        Subject.of(VARIANT, "onnxruntime:cpu", DecoderOptions(threads=1), HERE),
        Subject.of(VARIANT, "onnxruntime:cpu", DecoderOptions(prefill_chunk=128), HERE),
        Subject.of(VARIANT, "onnxruntime:cpu", DecoderOptions(kv_type="int8"), HERE),
        Subject.of(VARIANT, "onnxruntime:cpu", DecoderOptions(batch_invariant=True), HERE),
        Subject.of(VARIANT, "onnxruntime:cpu", DecoderOptions(properties={"a": "1"}), HERE),
        Subject.of(VARIANT, "onnxruntime:cpu", DecoderOptions(), "another processor"),
        Subject.of(
            msgspec.structs.replace(VARIANT, files=(FileEntry("a/model.onnx", 3, "1" * 64),)),
            "onnxruntime:cpu", DecoderOptions(), HERE,
        ),
    ],
)  # fmt: skip
def test_times_of_one_subject_say_nothing_of_another(kept: Observations, other: Subject) -> None:
    kept.keep(run(other))
    assert kept.of(SUBJECT) == []
    assert kept.of(other) == [run(other)]


def test_what_decides_nothing_is_no_part_of_the_subject() -> None:
    other = DecoderOptions(kv_tokens=99, max_sequences=3, cache_dir=Path("x"))
    assert Subject.of(VARIANT, "onnxruntime:cpu", other, HERE) == SUBJECT


def test_the_oldest_go(kept: Observations) -> None:
    other = Subject.of(VARIANT, "openvino:cpu", DecoderOptions(), HERE)
    kept.keep(run(other, "0"))
    for created in "12345":
        kept.keep(run(created=created))
    assert [each.created for each in kept.of(SUBJECT)] == list("12345")[-KEPT_EACH:]
    assert len(kept.of(other)) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\1\2",
        b"[]",
        b'{"runs": 3}',
        b'{"schema_version": 2, "runs": []}',
        msgspec.json.encode({"schema_version": 1, "runs": [], "more": 1}),
        b'{"schema_version": 1, "runs": [' + msgspec.json.encode(run())[:-20],
        b" " * (LARGEST + 1),
    ],
)
def test_a_broken_file_is_put_aside(
    kept: Observations, tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    file = tmp_path / "cache" / "timing.json"
    file.parent.mkdir()
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert kept.of(SUBJECT) == []
    assert "are not used" in caplog.text
    assert file.read_bytes() == data
    kept.keep(run())
    assert kept.of(SUBJECT) == [run()]
    assert kept.broken.read_bytes() == data
    assert str(kept.broken) in caplog.text
    assert {each.name for each in file.parent.iterdir()} == {"timing.json", "timing.broken.json"}


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX")
def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    kept = Observations(tmp_path / "cache" / "timing.json")
    (tmp_path / "cache" / "timing.new").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"cannot write .*timing\.json"):
        kept.keep(run())


def test_rounds_become_one() -> None:
    one = [FirstToken(prompt=9, seconds=2.0), EachToken(held=9, seconds=0.5)]
    two = [FirstToken(prompt=9, seconds=1.0), EachToken(held=10, seconds=0.7)]
    assert merged([one, two]) == [
        FirstToken(prompt=9, seconds=1.0, slowest=2.0),
        EachToken(held=9, seconds=0.5, slowest=0.7),
    ]
    assert merged([one]) == one
    with pytest.raises(ValueError, match="zip"):
        merged([one, two[:1]])


# --- the model of what would be opened --------------------------------------------------------------------------------


def test_the_model_of_what_would_be_opened(tmp_path: Path) -> None:
    home, options = Home(tmp_path, tmp_path / "cache"), DecoderOptions()
    with pytest.raises(NotMeasured, match="not measured here; edge-glm bench REF --device onnxruntime:cpu"):
        timing_model(home, VARIANT, "onnxruntime:cpu", options)
    kept = Observations(home.timing)
    kept.keep(run(Subject.of(VARIANT, "onnxruntime:cpu", options, fingerprint())))
    assert timing_model(home, VARIANT, "onnxruntime:cpu", options).ttft(500).seconds > 0
    with pytest.raises(NotMeasured, match="not measured here as it would be opened"):
        timing_model(home, VARIANT, "onnxruntime:cpu", DecoderOptions(threads=1))


def test_too_few_times_say_what_to_do(tmp_path: Path) -> None:
    home = Home(tmp_path, tmp_path / "cache")
    few = msgspec.structs.replace(
        run(Subject.of(VARIANT, "onnxruntime:cpu", DecoderOptions(), fingerprint())), observations=observed()[:3]
    )
    Observations(home.timing).keep(few)
    with pytest.raises(NotMeasured, match="too little to go by"):
        timing_model(home, VARIANT, "onnxruntime:cpu", DecoderOptions())
