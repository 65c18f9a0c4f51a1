"""What was timed is kept, only for what it speaks of, and never in the way."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from devices.base import DecoderOptions
from edge_runtime.errors import NotMeasured
from edge_runtime.machine import fingerprint
from edge_runtime.package import FileEntry, Variant
from edge_runtime.paths import Home
from edge_runtime.timing.fitted import timing_model
from edge_runtime.timing.observations import (
    KEPT_EACH,
    EachToken,
    FirstToken,
    Observations,
    Subject,
    TimedRun,
    merged,
)
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


def test_lists_within_lists_are_a_broken_file(kept: Observations, tmp_path: Path) -> None:
    """Else a model could not be opened for them: they raise RecursionError where a kind has yet to be told."""
    file = tmp_path / "cache" / "timing.json"
    file.parent.mkdir()
    data = msgspec.json.encode({"schema_version": 1, "runs": [run()]})
    file.write_bytes(data.replace(b'{"type":"first"', b'{"held":' + b"[" * 5000 + b"]" * 5000 + b',"type":"first"', 1))
    assert kept.of(SUBJECT) == []
    kept.keep(run())
    assert kept.of(SUBJECT) == [run()]


def test_rounds_become_one() -> None:
    one = [FirstToken(prompt=9, seconds=2.0), EachToken(held=9, seconds=0.5)]
    two = [FirstToken(prompt=9, seconds=1.0), EachToken(held=10, seconds=0.7)]
    three = [FirstToken(prompt=9, seconds=1.25), EachToken(held=9, seconds=0.8)]
    assert merged([one, two, three]) == [
        FirstToken(prompt=9, seconds=1.25, fastest=1.0, slowest=2.0),
        EachToken(held=9, seconds=0.7, fastest=0.5, slowest=0.8),
    ]
    assert merged([one, two])[0].seconds == 1.5
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
