"""Records in a file: whatever is wrong with it, reading goes on, and nothing is lost without a word."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import msgspec
import pytest

from edge_runtime import record_file
from edge_runtime.errors import StorageError
from edge_runtime.record_file import LARGEST, RecordFile


class First(msgspec.Struct, frozen=True, tag="first"):
    value: int


class Second(msgspec.Struct, frozen=True, tag="second"):
    value: int


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    values: list[First | Second] = []


ONE, TWO = Record("1", [First(1), Second(2)]), Record("2")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "some.json"


@pytest.fixture(params=[False, True], ids=["with a version", "bare"])
def records(request: pytest.FixtureRequest, file: Path) -> RecordFile[Record]:
    log = logging.getLogger("edge_glm.some")
    return RecordFile(file, Record, 3, log, "do it again", bare=request.param)


def add(records: RecordFile[Record], *more: Record) -> None:
    for each in more:
        records.change(lambda before, each=each: [*before, each])  # type: ignore[misc]


def test_what_is_kept_comes_back(records: RecordFile[Record], file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert records.read() == []
    add(records, ONE, TWO)
    assert records.read() == [ONE, TWO]
    records.change(lambda before: [each for each in before if each != ONE])
    assert records.read() == [TWO]
    add(records, *[Record(str(number)) for number in range(5)])
    assert [each.name for each in records.read()] == ["2", "3", "4"]
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    assert not caplog.records


NESTED = b'{"name": "1", "values": [{"value": ' + b"[" * 5000 + b"]" * 5000 + b', "type": "first"}]}'
BROKEN = {
    "empty": b"",
    "binary": b"\0\xff\xfe",
    "cut": b'{"schema_version": 1, "runs": [',
    "null": b"null",
    "another version": b'{"schema_version": 2, "runs": []}',
    "more": b'{"schema_version": 1, "runs": [], "more": 1}',
    "large": b" " * (LARGEST + 1),
    "nested before its tag": b'{"schema_version": 1, "runs": [' + NESTED + b"]}",
    "nested before its tag, bare": b"[" + NESTED + b"]",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_put_aside(
    records: RecordFile[Record], file: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_bytes(data)
    assert records.read() == []
    assert f"what is kept in {file} is not used: " in caplog.text
    assert caplog.text.rstrip().endswith("; do it again")
    assert file.read_bytes() == data
    add(records, ONE)
    assert records.read() == [ONE]
    assert records.broken.read_bytes() == data
    assert f"could not be read and is in {records.broken} now" in caplog.text
    assert {each.name for each in file.parent.iterdir()} == {"some.json", "some.broken.json"}


def test_a_file_that_cannot_be_read_is_not_replaced(
    records: RecordFile[Record], file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(records, ONE)
    kept = file.read_bytes()
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == file:
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert records.read() == []
        assert "Permission denied; do it again" in caplog.text
        with pytest.raises(StorageError, match=r"some\.json: Permission denied"):
            add(records, TWO)
    assert file.read_bytes() == kept
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_a_broken_file_stays_when_a_new_one_cannot_be_written(records: RecordFile[Record], file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"{")
    file.with_suffix(".new").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*some\.json"):
        add(records, ONE)
    assert file.read_bytes() == b"{"
    assert not records.broken.exists()


def test_nothing_is_lost_between_several_writers(
    records: RecordFile[Record], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_kept", 100)
    threads = [threading.Thread(target=add, args=(records, Record(str(number)))) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.name for each in records.read()) == [str(number) for number in range(8)]


def test_the_limit_is_that_of_the_file(records: RecordFile[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    add(records, ONE)
    monkeypatch.setattr(record_file, "LARGEST", 10)
    assert records.read() == []
