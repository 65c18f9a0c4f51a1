"""Compiled models on disk: found again, never trusted, never in the way."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from devices.compile_cache import CompileCache, cache_key
from devices.errors import EngineError


class Engine:
    """Compiles a text to itself, in capitals."""

    def __init__(self) -> None:
        self.compiled = 0

    def make(self) -> str:
        self.compiled += 1
        return "MODEL"

    def take(self, blob: NDArray[np.uint8]) -> str:
        if blob.tobytes() != b"MODEL":
            raise EngineError("it is of another version")
        return blob.tobytes().decode()

    def dump(self, compiled: str) -> bytes:
        return compiled.encode()


def opened(cache: CompileCache, engine: Engine, key: str = "key") -> str:
    return cache.open(key, engine.take, engine.make, engine.dump)


def test_a_model_is_compiled_once(tmp_path: Path) -> None:
    engine = Engine()
    for _ in range(2):
        assert opened(CompileCache(tmp_path / "new"), engine) == "MODEL"
    assert engine.compiled == 1
    opened(CompileCache(tmp_path / "new"), engine, "other")
    assert engine.compiled == 2
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o600}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_one_is_compiled_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    engine, cache = Engine(), CompileCache(tmp_path)
    opened(cache, engine)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    changed = {"flip": data[:-1] + b"X", "cut": data[:-1], "empty": b"", "foreign": b"MODEL" * 100}
    path.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING):
        assert opened(cache, engine) == "MODEL"
    assert "and is compiled anew" in caplog.text
    assert opened(cache, engine) == "MODEL"
    assert engine.compiled == 2


def test_one_that_the_engine_refuses_is_compiled_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, cache = Engine(), CompileCache(tmp_path)
    cache.open("key", engine.take, lambda: "OTHER", engine.dump)
    with caplog.at_level(logging.WARNING):
        assert opened(cache, engine) == "MODEL"
    assert "it is of another version" in caplog.text
    assert opened(cache, engine) == "MODEL"
    assert engine.compiled == 1


def test_an_engine_that_cannot_export_goes_on_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def dump(compiled: str) -> bytes:
        raise EngineError(f"{compiled} cannot be exported")

    engine, cache = Engine(), CompileCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert cache.open("key", engine.take, engine.make, dump) == "MODEL"
    assert "MODEL cannot be exported" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("a file")
    engine = Engine()
    with caplog.at_level(logging.WARNING):
        assert opened(CompileCache(tmp_path / "taken"), engine) == "MODEL"
    assert "is not kept in" in caplog.text


def test_failing_to_compile_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    def make() -> str:
        raise EngineError("too many layers")

    engine = Engine()
    with pytest.raises(EngineError, match="too many layers"):
        CompileCache(tmp_path).open("key", engine.take, make, engine.dump)
    assert list(tmp_path.iterdir()) == []


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    engine = Engine()
    opened(CompileCache(tmp_path), engine, "a")
    size = (tmp_path / "a.blob").stat().st_size
    cache = CompileCache(tmp_path, 2 * size + 1)
    opened(cache, engine, "b")
    os.utime(tmp_path / "a.blob", (1, 1))
    os.utime(tmp_path / "b.blob", (2, 2))
    opened(cache, engine, "a")  # used now
    opened(cache, engine, "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.blob", "c.blob"]


def test_one_larger_than_the_cache_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    opened(CompileCache(tmp_path), engine, "a")
    with caplog.at_level(logging.WARNING):
        assert opened(CompileCache(tmp_path, 10), engine, "b") == "MODEL"
    assert "more than the 10 that the cache may have" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["a.blob"]


class TestKey:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        model = tmp_path / "openvino_model.xml"
        model.write_text("<net/>")
        model.with_suffix(".bin").write_bytes(b"weights")
        return model

    def test_everything_counts(self, model: Path) -> None:
        keys = [cache_key(model, {"A": "1"}, {"driver": "1"})]
        assert cache_key(model, {"A": "1"}, {"driver": "1"}) == keys[0]
        keys.append(cache_key(model, {"A": "2"}, {"driver": "1"}))
        keys.append(cache_key(model, {"A": "1"}, {"driver": "2"}))
        os.utime(model.with_suffix(".bin"), (1, 1))
        keys.append(cache_key(model, {"A": "1"}, {"driver": "1"}))
        model.with_suffix(".bin").write_bytes(b"weights2")
        os.utime(model.with_suffix(".bin"), (1, 1))
        keys.append(cache_key(model, {"A": "1"}, {"driver": "1"}))
        model.write_text("<net />")
        keys.append(cache_key(model, {"A": "1"}, {"driver": "1"}))
        assert len(set(keys)) == len(keys)

    def test_a_missing_file(self, model: Path) -> None:
        model.with_suffix(".bin").unlink()
        with pytest.raises(FileNotFoundError):
            cache_key(model, {}, {})
