"""Wheels that carry a model: archives that are damaged, and entries that no archiver would write."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from edge_runtime.fetch import _unpack_wheel
from exporters.families import architecture
from exporters.formats import open_checkpoint
from tests.exporters.gguf_model import random_tensors, write_model
from tests.fuzz.mutation import EDGES, damage
from tests.fuzz.surface import Case, Failure, Surface, sometimes
from tests.fuzz.watched import peak

LLAMA = Path(__file__).parents[2] / "fixtures" / "families" / "llama"
_NAME = "tiny_model-1.2-py3-none-any.whl"
_INFO = "tiny_model-1.2.dist-info/"
_METADATA = b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2\nLicense: Apache-2.0\n"
_STORED, _DEFLATED, _BZIP2, _LZMA = 0, 8, 12, 14
_SOUND = 4
"""Seeds that are accepted; they come first."""
_BOMB = 48 << 20
"""Bytes of zeros, fewer than where the ratio counts."""
_MOST_GROWTH = 24 << 20
"""Bytes by which a case may raise the peak of memory: the wheel is small, and read in pieces."""
_DIRECTORY = b"PK\x01\x02"


@dataclass(frozen=True)
class Entry:
    """A member, as the directory of the archive tells of it."""

    name: bytes
    packed: bytes
    method: int
    crc: int
    packed_size: int
    size: int
    flags: int = 0
    extra: bytes = b""
    local_name: bytes | None = None
    """In the header before the data; None: the same."""
    offset: int | None = None
    """Of that header; None: where it is."""
    attributes: int = 0o644 << 16


class Wheels(Surface):
    name = "wheel"
    weight = 6

    def prepare(self) -> list[Case]:
        path = self.folder / "model.gguf"
        config = json.loads((LLAMA / "config.json").read_text())
        write_model(path, config, random_tensors(architecture(config)))
        gguf = path.read_bytes()
        path.unlink()
        # of formats, here: what is in the files is for other surfaces
        folder = {f"m/{name}": (LLAMA / name).read_bytes() for name in ("config.json", "model.safetensors")}
        folder |= {"m/tokenizer.json": b"{}", "m/1_Pooling/config.json": b"{}", "m/__init__.py": b"raise SystemExit"}
        self._models = [
            [made(name.encode(), data, method) for name, data in {**files, f"{_INFO}METADATA": _METADATA}.items()]
            for method in (_STORED, _DEFLATED, _BZIP2, _LZMA)
            for files in ({"m/model.gguf": gguf}, folder)
        ]
        self._seeds = [put_together(entries) for entries in self._models]
        return [Case(_NAME, data) for data in self._seeds[:_SOUND]]

    def make(self, rng: random.Random) -> Case:
        place = rng.randrange(_SOUND if rng.random() < 0.85 else len(self._models))
        if rng.random() < 0.3:
            data = self._seeds[place]
            start = data.index(_DIRECTORY) if rng.random() < 0.6 else 0  # all that is told of the members is there
            return Case(_NAME, data[:start] + damage(rng, data[start:], self._seeds))
        entries = list(self._models[place])
        for _ in range(rng.randint(1, 3)):
            rng.choice(_WAYS)(rng, entries)
        data = put_together(entries)
        if rng.random() < 0.1:
            data = _end(rng, data)
        return Case(_NAME, damage(rng, data, most=1) if rng.random() < 0.1 else data)

    def open(self) -> None:
        self._run(Case(_NAME, self._seeds[0]), opened=True)  # what is loaded once is no case's memory

    def run(self, case: Case) -> None:
        self._run(case, opened=sometimes(case, 4))

    def _run(self, case: Case, *, opened: bool) -> None:
        workdir, wheel = self.folder / "work", self.folder / _NAME
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.mkdir()
        wheel.write_bytes(case.data)
        before = {path.name for path in self.folder.iterdir()}, peak()
        try:
            fetched = _unpack_wheel(wheel, workdir)
        finally:
            _check(workdir, wheel)
            if {path.name for path in self.folder.iterdir()} != before[0]:
                raise Failure("something was written beside the folder to work in")
            if peak() - before[1] > _MOST_GROWTH:
                raise Failure(f"memory grew by more than {_MOST_GROWTH >> 20} MiB")
        if opened:
            open_checkpoint(fetched.path)


def _check(workdir: Path, wheel: Path) -> None:
    """What was written, where and how much of it."""
    paths = list(workdir.rglob("*"))
    written = sum(path.lstat().st_size for path in paths if not path.is_dir())
    for path in paths:
        if path.relative_to(workdir).parts[0] != "model":
            raise Failure("a file outside the model's folder")
        if path.is_symlink():
            raise Failure("a link")
    if written:
        with zipfile.ZipFile(wheel) as archive:
            told = sum(member.file_size for member in archive.infolist())
        if written > told:
            raise Failure("more was written than is declared")


# --- putting together -------------------------------------------------------------------------------------------------


def made(name: bytes, data: bytes, method: int) -> Entry:
    """A sound entry."""
    packed = _packed(data, method)
    return Entry(name, packed, method, zlib.crc32(data), len(packed), len(data))


@cache
def _packed(data: bytes, method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x", data)
    start = 30 + len("x")
    return file.getvalue()[start : start + archive.getinfo("x").compress_size]


def put_together(entries: list[Entry]) -> bytes:
    """An archive, sound or not."""
    file, directory = bytearray(), bytearray()
    for each in entries:
        name = each.name if each.local_name is None else each.local_name
        offset = len(file) if each.offset is None else each.offset
        told = (each.flags, each.method, 0, 0x21, each.crc, each.packed_size, each.size)
        file += struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, *told, len(name), len(each.extra))
        file += name + each.extra + each.packed
        sizes = (len(each.name), len(each.extra), 0, 0, 0, each.attributes, offset)
        directory += struct.pack("<4s6H3I5H2I", _DIRECTORY, 0x314, 20, *told, *sizes) + each.name + each.extra
    count = len(entries)
    return bytes(file + directory) + struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(file), 0
    )


# --- ways to make nonsense of one -------------------------------------------------------------------------------------

Way = Callable[[random.Random, list[Entry]], None]
_NUMBERS = tuple(each for each in EDGES if each < 2**32)
_NAMES = (
    b"", b"\0", b"/", b".", b"..", b"../x", b"../../x.gguf", b"/etc/x.gguf", b"a\\b.gguf", b"..\\..\\x.gguf",
    b"C:x.gguf", b"\xff.gguf", b"\xff\xfe", b"x" * 300 + b".gguf", b"x" * 65_000, b"m/" + b"m" * 255 + b".safetensors",
    b".gguf", b"m//model.safetensors", b"./m/config.json", b"config.json", b"other/model.safetensors",
    b"model.safetensors", b"m/../config.json", b"m/1_Pooling", b"m/2_Pooling/config.json", b"m/.jinja",
    b"m/2_Pooling/../config.json", b"m/x\0.jinja", b"m/\x1b[2J.jinja", b"m/\xe2\x80\xae.jinja", b"m/a:b.jinja",
    b"m/CON.jinja", b"m/ .jinja", b"m/config.json/", b"1_Pooling/config.json", b"x.dist-info/METADATA",
)  # fmt: skip
_EXTRAS = (
    b"\1\0\x08\0", b"\1\0\x08\0" + b"\xff" * 8, b"\1\0\x18\0" + b"\xff" * 24, b"\1\0\0\0", b"\1\0\xff\xff", b"\1",
    b"\0" * 4, b"\x75\x70\x05\0\1\0\0\0\0", b"\x75\x70\x06\0\1\0\0\0\0\xff", b"\x75\x70\x01\0\1", b"\x99\x99\xff\xff",
    b"x" * 60_000,
)  # fmt: skip


def _some(rng: random.Random, entries: list[Entry]) -> int:
    return rng.randrange(len(entries))


def _method(rng: random.Random, entries: list[Entry]) -> None:
    place = _some(rng, entries)
    entries[place] = replace(entries[place], method=rng.choice((0, 1, 5, 6, 8, 9, 12, 14, 93, 95, 98, 99, 65535)))


def _flags(rng: random.Random, entries: list[Entry]) -> None:
    place = _some(rng, entries)
    entries[place] = replace(entries[place], flags=rng.choice((1, 2, 8, 0x20, 0x40, 0x800, 0x2000, 0xFFFF)))


def _sizes(rng: random.Random, entries: list[Entry]) -> None:
    place = _some(rng, entries)
    each = entries[place]
    size = rng.choice((each.size + 1, max(each.size - 1, 0), each.size * 2, *_NUMBERS)) % 2**32
    packed = rng.choice((each.packed_size + 1, max(each.packed_size - 1, 0), each.packed_size // 2, *_NUMBERS)) % 2**32
    crc = zlib.crc32(bytes(1)) if rng.random() < 0.2 else each.crc
    way = rng.randrange(4)
    if way == 0:
        entries[place] = replace(each, size=size, crc=crc)
    elif way == 1:
        entries[place] = replace(each, packed_size=packed)
    elif way == 2:
        entries[place] = replace(each, size=size, packed_size=packed)
    else:
        entries[place] = replace(each, crc=rng.choice((0, each.crc ^ 1, 2**32 - 1)))


def _zip64(rng: random.Random, entries: list[Entry]) -> None:
    """Sizes that are told in eight bytes each, or are not."""
    place = _some(rng, entries)
    each = entries[place]
    true = (each.size, each.packed_size)
    numbers = [rng.choice((*true, *EDGES, 2**64 - 1)) if rng.random() < 0.5 else number for number in true]
    extra = struct.pack("<2H2Q", 1, rng.choice((16, 16, 16, 8, 24, 0)), *numbers)
    entries[place] = replace(each, size=2**32 - 1, packed_size=2**32 - 1, extra=extra)


def _extra(rng: random.Random, entries: list[Entry]) -> None:
    place = _some(rng, entries)
    entries[place] = replace(entries[place], extra=rng.choice(_EXTRAS))


def _name(rng: random.Random, entries: list[Entry]) -> None:
    place = _some(rng, entries)
    name = rng.choice((*_NAMES, *(each.name for each in entries)))
    local = entries[place].name if rng.random() < 0.1 else None
    flags = 0x800 if rng.random() < 0.3 else entries[place].flags
    entries[place] = replace(entries[place], name=name, local_name=local, flags=flags)


def _add(rng: random.Random, entries: list[Entry]) -> None:
    name = rng.choice((*_NAMES, *(each.name for each in entries)))
    entry = rng.choice((made(name, b"{}", _STORED), replace(rng.choice(entries), name=name)))
    entries.insert(rng.randrange(len(entries) + 1), entry)


def _drop(rng: random.Random, entries: list[Entry]) -> None:
    if len(entries) > 1:
        del entries[_some(rng, entries)]


def _offset(rng: random.Random, entries: list[Entry]) -> None:
    place = _some(rng, entries)
    entries[place] = replace(entries[place], offset=rng.choice((*_NUMBERS, 30, 31)))


def _attributes(rng: random.Random, entries: list[Entry]) -> None:
    """A link, a device, a folder."""
    place = _some(rng, entries)
    kind = rng.choice((0o120777, 0o020666, 0o040755, 0o104777))
    entries[place] = replace(entries[place], attributes=kind << 16)


def _bomb(rng: random.Random, entries: list[Entry]) -> None:
    """That says what it is, or lies."""
    place = _some(rng, entries)
    method = rng.choice((_DEFLATED, _BZIP2, _LZMA))
    packed = _zeros(method)
    size = rng.choice((_BOMB, 1000, 1000, 2**20 - 1, 2**32 - 2))
    crc = zlib.crc32(bytes(min(size, _BOMB)))
    entries[place] = Entry(entries[place].name, packed, method, crc, len(packed), size)


@cache
def _zeros(method: int) -> bytes:
    return _packed.__wrapped__(bytes(_BOMB), method)  # the zeros themselves are not kept


_WAYS: tuple[Way, ...] = (
    _method, _flags, _sizes, _sizes, _zip64, _extra, _name, _name, _name, _add, _add, _drop, _offset, _attributes,
    _bomb,
)  # fmt: skip


def _end(rng: random.Random, data: bytes) -> bytes:
    """The record at the end: how many entries, how long, where."""
    changed = bytearray(data)
    layout, place = rng.choice((("<H", 8), ("<H", 10), ("<I", 12), ("<I", 16), ("<H", 20)))
    number = rng.choice(_NUMBERS) % (1 << 8 * struct.calcsize(layout))
    struct.pack_into(layout, changed, len(data) - 22 + place, number)
    return bytes(changed)
