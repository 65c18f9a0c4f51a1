"""GGUF files: bytes that are damaged, and whole files of nonsense."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import GGMLQuantizationType

from exporters.families import architecture
from tests.exporters.gguf_model import random_tensors, write_model
from tests.exporters.gguf_vocabulary import FIXTURES
from tests.fuzz.mutation import EDGES, damage
from tests.fuzz.surface import Case, Surface, sometimes
from tests.fuzz.surfaces.checkpoint import command_checkpoint, use_checkpoint

FAMILIES = Path(__file__).parents[2] / "fixtures" / "families"
_KINDS: tuple[tuple[str, GGMLQuantizationType], ...] = (
    ("llama", GGMLQuantizationType.F32),
    ("llama-llama3", GGMLQuantizationType.Q4_0),
    ("qwen3", GGMLQuantizationType.Q8_0),
    ("phi3-longrope", GGMLQuantizationType.F16),
    ("gemma2", GGMLQuantizationType.F32),
    ("gemma3", GGMLQuantizationType.Q4_1),
    ("glm", GGMLQuantizationType.F32),
    ("granite", GGMLQuantizationType.Q5_0),
)
_LAYOUTS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass
class Field:
    key: bytes
    kind: int
    value: Any
    """Of a string its bytes; of an array (kind, values)."""


@dataclass
class Parts:
    """A GGUF file in pieces that can be put together again, sound or not."""

    version: int
    fields: list[Field]
    tensors: list[list[Any]]
    """Name, dimensions, type, offset."""
    data: bytes
    counts: list[int] = field(default_factory=list)
    """Tensors and fields, where the header lies about them."""


class GgufFiles(Surface):
    name = "gguf"
    weight = 15

    def prepare(self) -> list[Case]:
        self._seeds = []
        for name, kind in _KINDS:
            path = self.folder / f"{name}.gguf"
            config = json.loads((FAMILIES / name / "config.json").read_text())
            config = {key: value for key, value in config.items() if value is not None}
            extra = _sentencepiece if name == "llama" else _chat
            write_model(path, config, random_tensors(architecture(config)), kind=kind, extra=extra)
            self._seeds.append(Case("model.gguf", path.read_bytes()))
            path.unlink()
        return self._seeds

    def make(self, rng: random.Random) -> Case:
        seed = rng.choice(self._seeds)
        if rng.random() < 0.45:
            return Case(seed.name, damage(rng, seed.data, [each.data for each in self._seeds]))
        parts = take_apart(seed.data)
        other = take_apart(rng.choice(self._seeds).data)
        for _ in range(rng.randint(1, 3)):
            rng.choice(_WAYS)(rng, parts, other)
        data = put_together(parts)
        return Case(seed.name, damage(rng, data, most=1) if rng.random() < 0.1 else data)

    def run(self, case: Case) -> None:
        path = self.folder / case.name
        path.write_bytes(case.data)
        if sometimes(case, 64):
            command_checkpoint(path, self.folder / "out")
        use_checkpoint(path)


def _chat(writer: gguf.GGUFWriter) -> None:
    writer.add_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_name("tiny")


def _sentencepiece(writer: gguf.GGUFWriter) -> None:
    """Its vocabulary in place of the plain one."""
    _chat(writer)
    vocabulary = json.loads((FIXTURES / "vocabulary-spm.json").read_text())
    fields = writer.kv_data[0]
    size = len(fields["tokenizer.ggml.tokens"].value)
    for key in ("model", "tokens", "merges", "pre"):
        del fields[f"tokenizer.ggml.{key}"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary["tokens"][:size])
    writer.add_token_types(vocabulary["types"][:size])
    writer.add_token_scores(vocabulary["scores"][:size])


# --- taking apart and putting together --------------------------------------------------------------------------------


def take_apart(data: bytes) -> Parts:
    """Of a sound file."""
    version, tensor_count, field_count = struct.unpack_from("<IQQ", data, 4)
    at = 24

    def number(layout: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(layout, data, at)
        at += struct.calcsize(layout)
        return value

    def text() -> bytes:
        nonlocal at
        length = number("<Q")
        at += length
        return data[at - length : at]

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind != _ARRAY:
            return number(_LAYOUTS[kind])
        item, count = number("<I"), number("<Q")
        return item, [value(item) for _ in range(count)]

    fields = []
    for _ in range(field_count):
        key, kind = text(), number("<I")
        fields.append(Field(key, kind, value(kind)))
    tensors = []
    for _ in range(tensor_count):
        name, dimensions = text(), number("<I")
        tensors.append([name, [number("<Q") for _ in range(dimensions)], number("<I"), number("<Q")])
    at += -at % 32
    return Parts(version, fields, tensors, data[at:])


def put_together(parts: Parts) -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    def packed(kind: int, value: Any) -> bytes:
        if kind == _STRING:
            return text(value)
        if kind == _ARRAY:
            item, values = value
            return struct.pack("<IQ", item, len(values)) + b"".join(packed(item, each) for each in values)
        return struct.pack(_LAYOUTS[kind], value)

    counts = parts.counts or [len(parts.tensors), len(parts.fields)]
    made = [b"GGUF", struct.pack("<IQQ", parts.version, *counts)]
    made += [text(each.key) + struct.pack("<I", each.kind) + packed(each.kind, each.value) for each in parts.fields]
    for name, dimensions, kind, offset in parts.tensors:
        made.append(text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset))
    head = b"".join(made)
    return head + b"\0" * (-len(head) % 32) + parts.data


# --- ways to make nonsense of one -------------------------------------------------------------------------------------

Way = Callable[[random.Random, Parts, Parts], None]


def _fitting(kind: int, number: float) -> Any:
    """``number`` in the type, as near as may be."""
    if kind == 7:
        return bool(number)
    if kind == 6:
        return max(min(float(number), 3e38), -3e38) if number == number else number
    if kind == 12:
        return float(number)
    bits = 8 * struct.calcsize(_LAYOUTS[kind])
    low = 0 if _LAYOUTS[kind].isupper() else -(1 << (bits - 1))
    return max(min(int(number), (1 << bits) - 1 + low), low) if abs(number) < 1e300 else 0


def _change_number(rng: random.Random, parts: Parts, other: Parts) -> None:
    chosen = rng.choice([each for each in parts.fields if each.kind in _LAYOUTS])
    wild = (float("nan"), float("inf")) if chosen.kind in (6, 12) else ()
    near = (chosen.value + 1, chosen.value - 1, chosen.value * 2, -chosen.value, 0)
    chosen.value = rng.choice((*(_fitting(chosen.kind, each) for each in (*EDGES, -1, *near)), *wild))


def _change_type(rng: random.Random, parts: Parts, other: Parts) -> None:
    chosen = rng.choice(parts.fields)
    kind = rng.choice((*_LAYOUTS, _STRING, _ARRAY))
    if kind == _STRING:
        value: Any = rng.choice((b"", b"x", b"1", b"\xff", b"x" * 5000, str(chosen.value).encode()[:5000]))
    elif kind == _ARRAY:
        item = rng.choice((*_LAYOUTS, _STRING))
        each = b"a" if item == _STRING else _fitting(item, rng.choice(EDGES))
        value = (item, [each] * rng.choice((0, 1, 2, 3, 100)))
    else:
        number = chosen.value if isinstance(chosen.value, int | float) else 1
        value = _fitting(kind, number)
    chosen.kind, chosen.value = kind, value


def _change_array(rng: random.Random, parts: Parts, other: Parts) -> None:
    """Mostly the vocabulary."""
    arrays = [each for each in parts.fields if each.kind == _ARRAY and each.value[1]]
    item, values = (chosen := rng.choice(arrays)).value
    values = list(values)
    place = rng.randrange(len(values))
    new: Any = rng.choice(values)
    if item == _STRING:
        new = rng.choice((b"", b" ", b"\xff\xfe", b"a" * 3000, b"a b c", b"\xe2\x96\x81", b"<0x0A>", b"<0xZZ>", new))
    elif rng.random() < 0.5:
        new = float("nan") if item in (6, 12) else _fitting(item, rng.choice((*EDGES, -1)))
    way = rng.randrange(4)
    if way == 0:
        del values[place:]
    elif way == 1:
        values.insert(place, new)
    elif way == 2:
        values = values * 3
    else:
        values[place] = new
    chosen.value = (item, values)


def _change_text(rng: random.Random, parts: Parts, other: Parts) -> None:
    chosen = rng.choice([each for each in parts.fields if each.kind == _STRING])
    texts = (b"", b"llama", b"gpt2", b"mistral", b"\xff", b"{% for %}", b"{{ x.y.z }}", b"x" * 70_000, b"none", b"bert")
    chosen.value = rng.choice((*texts, *(each.value for each in other.fields if each.kind == _STRING)))


def _drop_field(rng: random.Random, parts: Parts, other: Parts) -> None:
    del parts.fields[rng.randrange(len(parts.fields))]


def _borrow_field(rng: random.Random, parts: Parts, other: Parts) -> None:
    """Of another family, under this one's name or its own."""
    borrowed = rng.choice(other.fields)
    family = next((each.value for each in parts.fields if each.key == b"general.architecture"), b"llama")
    prefix, dot, rest = borrowed.key.partition(b".")
    own = isinstance(family, bytes) and prefix not in (b"general", b"tokenizer") and rng.random() < 0.8
    parts.fields.append(Field(family + dot + rest if own else borrowed.key, borrowed.kind, borrowed.value))


def _rename_field(rng: random.Random, parts: Parts, other: Parts) -> None:
    chosen = rng.choice(parts.fields)
    chosen.key = rng.choice((chosen.key + b"x", b"", b"\xff", b"x" * 70_000, rng.choice(parts.fields).key))


def _change_tensor(rng: random.Random, parts: Parts, other: Parts) -> None:
    tensor = rng.choice(parts.tensors)
    way = rng.randrange(7)
    if way == 0:
        tensor[0] = rng.choice((b"", b"\xff", b"x", rng.choice(parts.tensors)[0], rng.choice(other.tensors)[0]))
    elif way == 1:
        place = rng.randrange(len(tensor[1]))
        tensor[1][place] = rng.choice((*EDGES, 2**64 - 1, tensor[1][place] + 1, tensor[1][place] // 2))
    elif way == 2:
        tensor[1] = rng.choice((tensor[1][::-1], [*tensor[1], 1], tensor[1][:1], [], [1] * 5, [2**32, 2**32]))
    elif way == 3:
        tensor[2] = rng.choice((*range(40), 2**32 - 1))
    elif way == 4:
        tensor[3] = rng.choice(
            (*EDGES, 2**64 - 1, tensor[3] + 32, max(tensor[3] - 32, 0), rng.choice(parts.tensors)[3])
        )
    elif way == 5:
        parts.tensors.remove(tensor)
    else:
        parts.tensors.append([each if not isinstance(each, list) else list(each) for each in rng.choice(other.tensors)])


def _change_data(rng: random.Random, parts: Parts, other: Parts) -> None:
    parts.data = rng.choice((damage(rng, parts.data), parts.data[: rng.randrange(len(parts.data) + 1)], b""))


def _change_head(rng: random.Random, parts: Parts, other: Parts) -> None:
    if rng.random() < 0.3:
        parts.version = rng.choice((0, 1, 2, 4, 3 << 24, 2**32 - 1))
    else:
        counts = [len(parts.tensors), len(parts.fields)]
        counts[rng.randrange(2)] = rng.choice((*EDGES, 2**64 - 1, counts[0] + 1, max(counts[1] - 1, 0)))
        parts.counts = counts


_WAYS: tuple[Way, ...] = (
    _change_number, _change_number, _change_number, _change_type, _change_type, _change_array, _change_array,
    _change_text, _drop_field, _borrow_field, _borrow_field, _rename_field, _change_tensor, _change_tensor,
    _change_tensor, _change_data, _change_head,
)  # fmt: skip
