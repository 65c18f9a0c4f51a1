"""Damaged GGUF files: always one of our errors, never another exception, a long wait or a large allocation."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import CorruptModel, ModelError, ModelNotFound, UnsupportedModel
from exporters.families import architecture
from exporters.gguf_checkpoint import GgufCheckpoint
from exporters.gguf_file import open_gguf
from exporters.gguf_metadata import read_architecture
from exporters.gguf_tokenizer import read_text
from exporters.network import tensor_names
from tests.exporters.gguf_model import random_tensors, write_model
from tests.exporters.test_gguf_checkpoint import _config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = _config("llama")
    write_model(path, config, random_tensors(architecture(config)))
    return path.read_bytes()


def _read_all(path: Path) -> None:
    checkpoint = GgufCheckpoint(path)
    for name in tensor_names(checkpoint.architecture):
        checkpoint.tensor(name)


def _kv(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def _file(fields: list[bytes], tensors: list[bytes], counts: tuple[int, int] | None = None) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, *(counts or (len(tensors), len(fields))))
    body = head + b"".join(fields) + b"".join(tensors)
    return body + bytes(-len(body) % 32)


def _tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    entry = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
    return entry + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


def test_truncated_anywhere(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    lengths = [*range(64), *range(64, 6000, 97), *np.linspace(6000, len(whole) - 1, 60).astype(int).tolist()]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptModel):
            GgufCheckpoint(path)


def test_flipped_bytes(whole: bytes, tmp_path: Path) -> None:
    """Damage that still reads is no error; damage that does not is one of ours."""
    path = tmp_path / "flipped.gguf"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(3):
            data[int(rng.integers(0, 7000))] = int(rng.integers(0, 256))
        path.write_bytes(data)
        try:
            _read_all(path)
        except ModelError:
            refused += 1
    assert refused > 100


ABSURD = 2**60
CASES = {
    "bad magic": (b"GGML" + bytes(60), CorruptModel, "GGML"),
    "zeros": (bytes(64), CorruptModel, "GGUF"),
    "version 1": (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0) + bytes(32), UnsupportedModel, "version 1"),
    "version 99": (struct.pack("<4sIQQ", b"GGUF", 99, 0, 0) + bytes(32), UnsupportedModel, "version 99"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0) + bytes(32), UnsupportedModel, "big-endian"),
    "tensor count": (_file([], [], (ABSURD, 0)), CorruptModel, "tensors"),
    "field count": (_file([], [], (0, ABSURD)), CorruptModel, "metadata fields"),
    "key length": (_file([struct.pack("<Q", ABSURD) + b"abcdefgh"], []), CorruptModel, "name of"),
    "string length": (_file([_kv("a", 8, struct.pack("<Q", ABSURD))], []), CorruptModel, "string"),
    "array length": (_file([_kv("a", 9, struct.pack("<IQ", 4, ABSURD))], []), CorruptModel, "values of 'a'"),
    "strings length": (_file([_kv("a", 9, struct.pack("<IQ", 8, ABSURD))], []), CorruptModel, "strings of 'a'"),
    "nested array": (_file([_kv("a", 9, struct.pack("<IQ", 9, 1))], []), UnsupportedModel, "array of arrays"),
    "value type": (_file([_kv("a", 77, bytes(4))], []), CorruptModel, "unknown type 77"),
    "not UTF-8": (_file([_kv("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")], []), CorruptModel, "UTF-8"),
    "same key twice": (_file([_kv("a", 0, b"\x01")] * 2, []), CorruptModel, "twice"),
    "alignment": (_file([_kv("general.alignment", 4, struct.pack("<I", 3))], []), CorruptModel, "alignment"),
    "dimensions": (_file([], [_tensor("t", [1] * 5)]), CorruptModel, "5 dimensions"),
    "empty shape": (_file([], [_tensor("t", [4, 0])]), CorruptModel, "empty shape"),
    "huge shape": (_file([], [_tensor("t", [2**62, 2**62])]), CorruptModel, "would end at byte"),
    "offset outside": (_file([], [_tensor("t", [4], 0, ABSURD)]), CorruptModel, "would end at byte"),
    "tensor type": (_file([], [_tensor("t", [4], 250)]), UnsupportedModel, "type 250"),
    "broken blocks": (_file([], [_tensor("t", [33], 8)]) + bytes(64), CorruptModel, "whole Q8_0 blocks"),
    "same tensor twice": (_file([], [_tensor("t", [4])] * 2) + bytes(64), CorruptModel, "twice"),
    "overlap": (_file([], [_tensor("t", [16]), _tensor("u", [16], 0, 32)]) + bytes(128), CorruptModel, "overlaps"),
    "misaligned": (_file([], [_tensor("t", [4], 0, 5)]) + bytes(64), CorruptModel, "misplaced"),
}


@pytest.mark.parametrize("name", CASES)
def test_damaged(name: str, tmp_path: Path) -> None:
    data, error, said = CASES[name]
    (tmp_path / "bad.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=said):
            open_gguf(tmp_path / "bad.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["llama-yarn", "phi3-longrope", "gemma3", "granite"])
def test_any_field_of_any_type(name: str, tmp_path: Path) -> None:
    """A field with another type or an impossible value is an error of ours, or harmless."""
    config = _config(name)
    write_model(tmp_path / "tiny.gguf", config, random_tensors(architecture(config)))
    file = open_gguf(tmp_path / "tiny.gguf")
    extra = ("general.type", "split.count", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.token_type")
    values = (np.array([1, 2]), np.full(96, np.nan), ["a", "b"], [], -1, 0, 1, 2**40, 1e300, float("nan"), "x", True)
    refused = 0
    for key in (*file.metadata, *extra):
        for value in values:
            changed = replace(file, metadata={**file.metadata, key: value})
            try:
                arch = read_architecture(changed)
                read_text(changed.metadata, arch.vocab_size, "tiny.gguf")
            except ModelError:
                refused += 1
    assert refused > 150


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        open_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(ModelError):
        open_gguf(tmp_path)
