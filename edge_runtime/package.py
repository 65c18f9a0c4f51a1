"""The model package: a folder that holds everything needed to run one model.

::

    edge_glm.json            the manifest: what the model is, and every file with its size and SHA-256
    tokenizer.json           the ``tokenizers`` library's serialization
    chat_template.jinja      if the model has one
    generation_config.json   sampling defaults
    onnx-int4/…              one folder per variant (engine and weight format)

A package is whole or absent: see :mod:`edge_runtime.package_writer`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

import msgspec

from devices.base import DecoderSpec, Engine
from edge_runtime.disk import why
from edge_runtime.errors import ConfigError, CorruptModel, ModelNotFound, StorageError, UnsupportedModel
from edge_runtime.recipe import Compression

MANIFEST = "edge_glm.json"
SCHEMA_VERSION = 1
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"

Weights = Literal["fp32", "fp16", "int8", "int4"]
WeightsWish = Weights | Literal["auto"]
"""auto: see :mod:`edge_runtime.variants`."""
ENGINES: tuple[Engine, ...] = get_args(Engine)
WEIGHTS: tuple[Weights, ...] = ("fp32", "fp16", "int8", "int4")


Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
"""Of layers and heads, and of a head's size. Memory is planned and arrays are made by such numbers before a weight has
shown whether they are true; no model's comes near these bounds."""
Length = Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]
"""Of a vocabulary, a context and so on."""
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the package."""

    path: str
    """Relative to the package, with ``/``."""
    bytes: Size
    sha256: str


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The model for one engine at one weight format."""

    name: str
    engine: Engine
    weights: Weights
    model: str
    """Path of the graph file."""
    files: tuple[FileEntry, ...]
    compression: Compression | None = None
    """How it was made smaller; None: as the weight format says."""

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)

    @property
    def digest(self) -> str:
        """Of all its files: what was measured speaks for these."""
        known = sorted((entry.path, entry.sha256) for entry in self.files)
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


class ArchitectureSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device and a planner must know of the network."""

    family: str
    parameters: Size
    num_layers: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    hidden_size: Length
    vocab_size: Length
    max_context: Length
    sliding_windows: tuple[Length | None, ...] = ()
    """Per layer; empty: none."""
    rope_switch: Length | None = None
    tied_head: bool | None = None
    """The vocabulary projection is the embedding. None: not known."""
    kv_heads: tuple[Count, ...] = ()
    """Per layer, where they are not all ``num_kv_heads``, which is then the most."""

    @property
    def total_kv_heads(self) -> int:
        """Over all layers."""
        return sum(self.kv_heads) or self.num_layers * self.num_kv_heads

    def spec(self, engine: Engine, model: Path) -> DecoderSpec:
        """What a device must know of the graph ``model``, made for ``engine``."""
        return DecoderSpec(
            engine=engine,
            model=model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_context=self.max_context,
            sliding_windows=self.sliding_windows,
            rope_switch=self.rope_switch,
            kv_heads=self.kv_heads,
        )


class EncoderSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a model that makes embeddings."""

    pooling: Literal["mean", "cls", "max"]
    """How the tokens' vectors become the text's."""
    normalized: bool
    """Embeddings have length 1."""
    first_position: Size = 0
    """Position of a text's first token."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``edge_glm.json``."""

    schema_version: int
    created_by: str
    name: str
    provenance: dict[str, Any]
    """``source``, ``licence``, ``sha256``, ``format``, … as far as known."""
    architecture: ArchitectureSummary
    add_bos: bool
    special_tokens: dict[str, str]
    eos_ids: tuple[TokenId, ...]
    files: tuple[FileEntry, ...]
    """Tokenizer, template and defaults: the files outside variant folders."""
    variants: tuple[Variant, ...]
    encoder: EncoderSummary | None = None
    """None: it makes text."""


@dataclass(frozen=True)
class Package:
    """An opened package. Its files have the recorded sizes; :meth:`verify` checks the hashes."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Package:
        """Read the manifest and check that every file is there in its size.

        ModelNotFound if ``folder`` is no package, UnsupportedModel for another schema version, CorruptModel.
        """
        folder = folder.absolute()
        path = folder / MANIFEST
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ModelNotFound(f"{folder} is not a model package: it has no {MANIFEST}") from error
        except OSError as error:
            raise StorageError(f"cannot read {path}: {why(error)}") from error
        package = cls(folder, decode_manifest(data, path))
        for entry in package.files():
            size = _size(folder / entry.path)
            if size != entry.bytes:
                raise CorruptModel(
                    f"{folder / entry.path} has {size} bytes, the manifest says {entry.bytes}; "
                    "remove the model (edge-glm rm) and pull or export it again"
                )
        return package

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files())

    def files(self, variant: Variant | None = None) -> Iterator[FileEntry]:
        """The common files and those of ``variant`` (None: of all variants)."""
        yield from self.manifest.files
        for each in self.manifest.variants if variant is None else (variant,):
            yield from each.files

    def verify(self, variant: Variant | None = None, stamp: Path | None = None) -> None:
        """Hash every file (of one variant, or all); CorruptModel names the first that is not as recorded.

        ``stamp``: a file that remembers size and times of files found right; those are not hashed again
        until they change.
        """
        known = _read_stamp(stamp)
        checked = {}
        for entry in self.files(variant):
            path = self.folder / entry.path
            mark = [*_times(path), entry.sha256]
            if known.get(entry.path) != mark:
                actual = file_sha256(path)
                if actual != entry.sha256:
                    raise CorruptModel(
                        f"{path} has SHA-256 {actual}, the manifest says {entry.sha256}; "
                        "remove the model (edge-glm rm) and pull or export it again"
                    )
            checked[entry.path] = mark
        if stamp is not None and any(known.get(path) != mark for path, mark in checked.items()):
            with suppress(OSError):  # only a cache: without it the files are hashed at the next load again
                stamp.parent.mkdir(parents=True, exist_ok=True)
                stamp.write_text(json.dumps({**known, **checked}), encoding="utf-8")

    def variant(self, engine: Engine, weights: Weights | None = None) -> Variant | None:
        """The variant for ``engine``, of any weight format if ``weights`` is None; None if there is none."""
        for variant in self.manifest.variants:
            if variant.engine == engine and weights in (None, variant.weights):
                return variant
        return None

    def spec(self, variant: Variant) -> DecoderSpec:
        """What :func:`devices.open_decoder` needs."""
        return self.manifest.architecture.spec(variant.engine, self.folder / variant.model)

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of its manifest, which has those of all files."""
        with storage_errors(f"cannot read {self.folder / MANIFEST}"):
            return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def chat_template(self) -> str | None:
        """Jinja source, None if the model has none."""
        return self._text(CHAT_TEMPLATE)

    @property
    def generation(self) -> dict[str, Any]:
        """generation_config.json; empty if there is none."""
        text = self._text(GENERATION)
        try:
            return {} if text is None else msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError) as error:
            raise CorruptModel(f"{self.folder / GENERATION} is not a JSON object: {error}") from error

    def _text(self, name: str) -> str | None:
        if all(entry.path != name for entry in self.manifest.files):
            return None
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptModel(f"cannot read {self.folder / name}: {error}") from error


def is_package(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def decode_manifest(data: bytes, origin: Path) -> Manifest:
    """Strictly: an unknown schema version, field or type, or a path out of the package is refused."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).schema_version
        if version != SCHEMA_VERSION:
            raise UnsupportedModel(
                f"{origin} has schema version {version}, this version of edge-glm reads {SCHEMA_VERSION}; "
                "update edge-glm or export the model again"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ConfigError) as error:  # the last: of a recipe
        raise CorruptModel(f"{origin} is not a valid manifest: {error}") from error
    _check_paths(manifest, origin)
    _check_layers(manifest.architecture, origin)
    return manifest


class _Versioned(msgspec.Struct):
    schema_version: int


def _check_paths(manifest: Manifest, origin: Path) -> None:
    entries = [entry.path for entry in manifest.files]
    for variant in manifest.variants:
        own = [entry.path for entry in variant.files]
        if variant.model not in own:
            raise CorruptModel(f"{origin}: variant {variant.name!r} does not list its model file {variant.model!r}")
        entries += own
    if TOKENIZER not in entries:
        raise CorruptModel(f"{origin} lists no {TOKENIZER}")
    for path in entries:
        if not is_inside(path):
            raise CorruptModel(f"{origin}: path {path!r} leads out of the package")


def _check_layers(network: ArchitectureSummary, origin: Path) -> None:
    for name in ("sliding_windows", "kv_heads"):
        given = len(getattr(network, name))
        if given not in (0, network.num_layers):
            raise CorruptModel(f"{origin}: {name} has {given} values for {network.num_layers} layers")
    if max(network.kv_heads, default=0) > network.num_kv_heads:
        raise CorruptModel(f"{origin}: kv_heads has more than num_kv_heads, {network.num_kv_heads}")


def is_inside(path: str) -> bool:
    """Whether a relative path with ``/`` stays in its folder, on any system."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not (path.startswith("/") or ".." in parts or "\\" in path or ":" in path or "\0" in path)


def file_entry(folder: Path, path: Path) -> FileEntry:
    """Size and hash of ``path``, named relative to ``folder``."""
    return FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path))


def file_sha256(path: Path) -> str:
    with storage_errors(f"cannot read {path}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Translate the system's errors (disk full, read-only, no permission, …) to StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{what}: {why(error)}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptModel(f"{path} is missing; remove the model (edge-glm rm) and pull or export it again") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {why(error)}") from error


def _times(path: Path) -> list[int]:
    with storage_errors(f"cannot read {path}"):
        stat = path.stat()
    # ctime also moves when content is replaced and mtime set back
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_stamp(stamp: Path | None) -> dict[str, list[int | str]]:
    if stamp is None:
        return {}
    try:
        return msgspec.json.decode(stamp.read_bytes(), type=dict[str, list[int | str]])
    except (OSError, msgspec.DecodeError, RecursionError):  # no stamp, or a damaged one: hash
        return {}
