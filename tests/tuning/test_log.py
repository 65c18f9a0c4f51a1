"""The tuning log: kept whole, read strictly, and used only for what it speaks for."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from edge_runtime.errors import StorageError
from edge_runtime.package import FileEntry, Variant
from edge_runtime.tuning.log import KEPT, TuningLog
from edge_runtime.tuning.records import Figures, Options, Run, Setup, Trial, Verdict
from tests.tuning.machine import DEFAULT, HERE, new_run

BEST = Setup("edge:cpu", Options(prefill_chunk=128, properties={"session.dynamic_block_base": "4"}))


def variant(sha256: str = "aa") -> Variant:
    return Variant("onnx-edge-int4", "onnxruntime-edge", "int4", "m.onnx", (FileEntry("m.onnx", 3, sha256),))


def found(**changes: object) -> Run:
    return new_run(**{"variants": {"edge:cpu": variant().digest}, "best": BEST, "gain": 1.2, **changes})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tuning.json"


@pytest.fixture
def log(file: Path) -> TuningLog:
    return TuningLog(file, HERE)


def best(log: TuningLog, device: str = "edge:cpu", workload: str = "one") -> Setup | None:
    run = log.best(variant(), device, workload)  # type: ignore[arg-type]
    return None if run is None else run.best


def test_everything_is_kept(log: TuningLog) -> None:
    run = found()
    run.trials += [
        Trial("default", DEFAULT, 0.0, 4.5, Figures(0.5, 1000.0, 100.0, 3.3, 1 << 20)),
        Trial("threads", BEST, 4.5, 2.0, failure="the measuring process was ended by signal 9"),
    ]
    run.verdicts.append(Verdict("threads", BEST, DEFAULT, "failed", why="it was ended"))
    log.keep(run)
    assert log.best(variant(), "edge:cpu", "one") == run


def test_nothing_tried(log: TuningLog, caplog: pytest.LogCaptureFixture) -> None:
    assert best(log) is None
    assert log.found({"edge:cpu": variant().digest}, "one") == ()
    assert not caplog.records


def test_a_run_replaces_its_own_earlier_states(log: TuningLog, file: Path) -> None:
    run = found(best=None)
    log.keep(run)
    assert best(log) is None
    run.best = BEST
    log.keep(run)
    assert best(log) == BEST
    assert len(msgspec.json.decode(file.read_bytes())["runs"]) == 1
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_latest_decision_counts(log: TuningLog) -> None:
    log.keep(found(started="2026-11-01T00:00:00+00:00"))
    log.keep(found(started="2026-11-02T00:00:00+00:00", best=None, candidate=DEFAULT))
    assert best(log) == BEST
    log.keep(found(started="2026-11-03T00:00:00+00:00", best=DEFAULT, gain=None))
    assert best(log) == DEFAULT


def test_others_do_not_count(log: TuningLog) -> None:
    log.keep(found())
    assert best(log, workload="many") is None
    assert best(log, device="openvino:cpu") is None
    assert log.best(variant("bb"), "edge:cpu", "one") is None  # the files have changed
    assert best(log) == BEST


def test_another_machine_is_ignored_with_a_note(log: TuningLog, caplog: pytest.LogCaptureFixture) -> None:
    log.keep(found(machine="another processor, onnxruntime 1.31"))
    assert best(log) is None
    assert log.found({"edge:cpu": variant().digest}, "one") == ()
    (record,) = caplog.records
    assert "another machine or with other versions (another processor, onnxruntime 1.31); tune again" in record.message
    caplog.clear()
    log.keep(found(started="2026-11-27T00:00:00+00:00"))
    assert best(log) == BEST
    assert not caplog.records


def test_what_this_machine_does_not_have_is_ignored_with_a_note(
    log: TuningLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.keep(found(best=Setup("edge:cpu", Options(properties={"session.disable_prepacking": "1"}))))
    assert best(log) is None
    assert "edge:cpu takes no session.disable_prepacking=1" in caplog.text
    assert log.found({"edge:cpu": variant().digest}, "one") == ()


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"schema_version": 2, "runs": []}',
        b'{"schema_version": 1, "runs": [{"started": 1}]}',
        b'{"schema_version": 1, "runs": [], "more": 1}',
    ],
)
def test_a_broken_log_is_ignored_with_a_note(
    log: TuningLog, file: Path, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_bytes(broken)
    assert best(log) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "tune again to replace it" in record.message
    log.keep(found())
    assert best(log) == BEST


@pytest.mark.parametrize(
    "change",
    [
        {"best": {"device": "edge:cpu", "options": {"threads": "two"}}},
        {"best": {"device": "edge:cpu", "options": {"kv_type": "int3"}}},
        {"best": {"device": "edge:cpu", "options": {"colour": 1}}},
        {"workload": "some"},
        {"limit_s": None},
    ],
)
def test_a_value_that_cannot_be(
    log: TuningLog, file: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    log.keep(found())
    content = msgspec.json.decode(file.read_bytes())
    content["runs"][0] |= change
    file.write_bytes(msgspec.json.encode(content))
    assert best(log) is None
    assert len(caplog.records) == 1


def test_it_does_not_grow_for_ever(log: TuningLog, file: Path) -> None:
    for number in range(KEPT + 3):
        log.keep(found(started=f"2026-11-26T10:{number:02}:00+00:00"))
    runs = msgspec.json.decode(file.read_bytes())["runs"]
    assert [run["started"][14:16] for run in runs] == [f"{number:02}" for number in range(3, KEPT + 3)]


def test_a_log_that_cannot_be_read_is_not_replaced(log: TuningLog, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.keep(found())
    kept = file.read_bytes()

    def refuse(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(StorageError, match="Input/output error"):
            log.keep(found(started="later"))
    assert file.read_bytes() == kept


def test_runs_of_the_same_second_are_two(log: TuningLog, file: Path) -> None:
    log.keep(found())
    log.keep(found(best=DEFAULT))
    assert best(log) == DEFAULT
    assert len(msgspec.json.decode(file.read_bytes())["runs"]) == 2


def test_runs_without_a_name_of_their_own_are_read(log: TuningLog, file: Path) -> None:
    """As they were kept before there were such."""
    log.keep(found())
    content = msgspec.json.decode(file.read_bytes())
    del content["runs"][0]["id"]
    file.write_bytes(msgspec.json.encode(content))
    assert best(log) == BEST
    log.keep(found(best=DEFAULT))
    assert len(msgspec.json.decode(file.read_bytes())["runs"]) == 2


def test_history_is_the_latest_first_decided_or_not(log: TuningLog) -> None:
    other = Setup("openvino:cpu")
    variants = {"edge:cpu": variant().digest, "openvino:cpu": "1"}
    log.keep(found(started="1"))
    log.keep(found(started="2", variants=variants, best=None, candidate=other))
    log.keep(found(started="3", variants=variants, best=None, candidate=Setup("openvino:cpu", Options(threads=-1))))
    log.keep(found(started="4", workload="many", best=DEFAULT))
    assert log.found(variants, "one") == (other, BEST)
    assert log.found({**variants, "openvino:cpu": "2"}, "one") == (BEST,)
