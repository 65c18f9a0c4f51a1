"""Model packages: strict to open, whole or absent whatever fails while one is written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import CorruptModel, ModelNotFound, StorageError, UnsupportedModel
from edge_runtime.package import MANIFEST, ArchitectureSummary, Package
from edge_runtime.package_writer import PackageContents, write_package
from exporters.export import export
from exporters.synthetic import SyntheticCheckpoint

ARCHITECTURE = ArchitectureSummary(
    family="llama",
    parameters=1000,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_size=64,
    vocab_size=512,
    max_context=128,
    sliding_windows=(None, 32),
)
CONTENTS = PackageContents(
    name="tiny",
    provenance={"source": "here"},
    architecture=ARCHITECTURE,
    tokenizer_json="{}",
    chat_template="{{ messages }}\n",
    special_tokens={"eos_token": "</s>"},
    add_bos=True,
    eos_ids=(1, 2),
    generation={"temperature": 0.5},
)


def write(target: Path, *variants: str) -> None:
    with write_package(target) as writer:
        for name in variants or ("onnx-int4",):
            folder = writer.variant_folder(name)
            (folder / "model.onnx").write_bytes(b"graph of " + name.encode())
            (folder / "model.onnx.data").write_bytes(b"weights")
            writer.add_variant(name, "onnxruntime", "int4", "model.onnx")
        writer.commit(CONTENTS)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((package / MANIFEST).read_bytes())
    change(manifest)
    (package / MANIFEST).write_text(json.dumps(manifest))


# --- opening ----------------------------------------------------------------------------------------------------------


def test_round_trip(package: Path) -> None:
    opened = Package.open(package)
    opened.verify()
    assert opened.chat_template == "{{ messages }}\n"
    assert opened.generation == {"temperature": 0.5}
    assert opened.manifest.eos_ids == (1, 2)
    assert opened.manifest.architecture == ARCHITECTURE
    variant = opened.variant("onnxruntime", "int4")
    assert variant is not None
    assert opened.variant("openvino") is None
    spec = opened.spec(variant)
    assert spec.model == package / "onnx-int4" / "model.onnx"
    assert (spec.num_layers, spec.max_context, spec.sliding_windows) == (2, 128, (None, 32))
    assert [path.name for path in package.parent.iterdir()] == ["tiny"]  # no lock, no temporary folder


def test_not_a_package(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelNotFound, match=MANIFEST):
            Package.open(folder)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda m: m.update(schema_version=99), UnsupportedModel, "schema version 99.*reads 1"),
        (lambda m: m.pop("schema_version"), CorruptModel, "schema_version"),
        (lambda m: m.update(surprise=1), CorruptModel, "surprise"),
        (lambda m: m.update(add_bos="yes"), CorruptModel, "add_bos"),
        (lambda m: m["variants"][0].update(engine="tvm"), CorruptModel, "tvm"),
        (lambda m: m["files"][0].update(bytes=3), CorruptModel, "2 bytes, the manifest says 3"),
        (lambda m: m["variants"][0].update(model="other.onnx"), CorruptModel, "other.onnx"),
        (lambda m: m["files"].pop(0), CorruptModel, "lists no tokenizer.json"),
        (lambda m: m["architecture"].update(num_layers=2**40), CorruptModel, "num_layers"),
        (lambda m: m["architecture"].update(head_dim=0), CorruptModel, "head_dim"),
        (lambda m: m["architecture"].update(vocab_size=-1), CorruptModel, "vocab_size"),
        (lambda m: m["architecture"].update(max_context=2**63), CorruptModel, "max_context|Integer value out of range"),
        (lambda m: m["architecture"].update(kv_heads=[2**40]), CorruptModel, "kv_heads"),
        (lambda m: m["files"][0].update(bytes=-1), CorruptModel, "bytes"),
        (lambda m: m["architecture"].update(vocab_size=-512), CorruptModel, "vocab_size"),
        (lambda m: m["architecture"].update(num_layers=2**31), CorruptModel, "num_layers"),
        (lambda m: m["architecture"].update(sliding_windows=[32]), CorruptModel, "sliding_windows has 1 .* 2 layers"),
        (lambda m: m["architecture"].update(kv_heads=[2, 3]), CorruptModel, "more than num_kv_heads, 2"),
        (lambda m: m.update(eos_ids=[-1]), CorruptModel, "eos_ids"),
    ],
)
def test_manifest_is_strict(
    package: Path, change: Callable[[Any], object], kind: type[Exception], message: str
) -> None:
    edit(package, change)
    with pytest.raises(kind, match=message):
        Package.open(package)


def test_a_manifest_without_end(package: Path) -> None:
    (package / MANIFEST).write_bytes(b'{"schema_version": 1, "name": ' + b"[" * 100_000)
    with pytest.raises(CorruptModel, match="not a valid manifest"):
        Package.open(package)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "..\\secret", "C:/x", "", "a\0b"])
def test_paths_stay_inside(package: Path, path: str) -> None:
    edit(package, lambda m: m["files"].append({"path": path, "bytes": 1, "sha256": "0"}))
    with pytest.raises(CorruptModel, match="leads out of the package"):
        Package.open(package)


def test_broken_json(package: Path) -> None:
    for text in (b"", b"{", b"[]", b'"\xff"'):
        (package / MANIFEST).write_bytes(text)
        with pytest.raises(CorruptModel, match="not a valid manifest"):
            Package.open(package)


def test_missing_and_truncated_files(package: Path) -> None:
    weights = package / "onnx-int4" / "model.onnx.data"
    weights.write_bytes(b"weigh")
    with pytest.raises(CorruptModel, match=r"model\.onnx\.data has 5 bytes, the manifest says 7"):
        Package.open(package)
    weights.unlink()
    with pytest.raises(CorruptModel, match=r"model\.onnx\.data is missing"):
        Package.open(package)


def test_wrong_hash(package: Path) -> None:
    (package / "onnx-int4" / "model.onnx.data").write_bytes(b"Weights")
    opened = Package.open(package)
    with pytest.raises(CorruptModel, match=hashlib.sha256(b"Weights").hexdigest()):
        opened.verify()


def test_stamp_saves_hashing_until_a_file_changes(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = tmp_path / "stamps" / "tiny.json"
    opened = Package.open(package)
    opened.verify(stamp=stamp)
    with monkeypatch.context() as patch:
        patch.setattr("edge_runtime.package.file_sha256", lambda path: pytest.fail(f"hashed {path} again"))
        opened.verify(stamp=stamp)
    weights = package / "onnx-int4" / "model.onnx.data"
    before = weights.stat()
    weights.write_bytes(b"Weights")  # same size, and the old time put back
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptModel):
        opened.verify(stamp=stamp)


def test_damaged_stamp_is_no_proof(package: Path, tmp_path: Path) -> None:
    stamp = tmp_path / "stamp.json"
    stamp.write_text("{")
    (package / "onnx-int4" / "model.onnx.data").write_bytes(b"Weights")
    with pytest.raises(CorruptModel):
        Package.open(package).verify(stamp=stamp)


# --- writing ----------------------------------------------------------------------------------------------------------


class Saboteur:
    """Raises at the n-th change to the file system below ``root`` (an audit hook; those cannot be taken out)."""

    def __init__(self) -> None:
        self.root = ""
        self.left = -1
        self.error: BaseException = OSError()
        sys.addaudithook(self._audit)

    def arm(self, root: Path, after: int, error: BaseException) -> None:
        self.root, self.left, self.error = str(root), after, error

    @property
    def struck(self) -> bool:
        return self.left < 0

    def disarm(self) -> None:
        self.root = ""

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.root or event not in ("open", "os.mkdir", "os.rename"):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if not str(arguments[0]).startswith(self.root):
            return
        self.left -= 1
        if self.left == -1:
            raise self.error


SABOTEUR = Saboteur()
FAILURES = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EROFS, "Read-only file system"),
    KeyboardInterrupt(),
]


def sabotaged(root: Path, after: int, error: BaseException, work: Callable[[], object]) -> tuple[bool, bool]:
    """Whether the failure was raised, and whether ``work`` failed; a failure must come through as what it is."""
    SABOTEUR.arm(root, after, error)
    expected = StorageError if isinstance(error, OSError) else type(error)
    failed = True
    try:
        with suppress(expected):
            work()
            failed = False
    finally:
        SABOTEUR.disarm()
    return SABOTEUR.struck, failed


@pytest.mark.parametrize("error", FAILURES, ids=["full", "read-only", "interrupt"])
def test_whole_or_absent(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "tiny"
    failures = 0
    for after in range(200):
        struck, failed = sabotaged(tmp_path, after, error, lambda: write(target, "a", "b"))
        if failed:
            failures += 1
            assert list(tmp_path.iterdir()) == []
            continue
        Package.open(target).verify()  # not reached, or harmless, as making a folder that is there already
        if not struck:
            break
        shutil.rmtree(target)
    assert not struck
    assert failures > 12  # every file, folder and rename had its turn


@pytest.mark.parametrize("error", FAILURES[::2], ids=["full", "interrupt"])
def test_adding_a_variant_leaves_a_whole_package(tmp_path: Path, error: BaseException) -> None:
    failures = 0
    for after in range(200):
        target = tmp_path / str(after) / "tiny"
        write(target)
        struck, failed = sabotaged(tmp_path, after, error, lambda target=target: write(target, "b", "c"))
        opened = Package.open(target)
        opened.verify()
        names = [variant.name for variant in opened.manifest.variants]
        assert names == (["onnx-int4"] if failed else ["onnx-int4", "b", "c"])
        failures += failed
        if not struck:
            break
        write(target, "d")  # and work can go on
    assert not struck
    assert failures > 8


class FailsAt(SyntheticCheckpoint):
    """A source that breaks in mid-export."""

    def __init__(self, tensor: str, error: BaseException) -> None:
        super().__init__("tiny")
        self._tensor = tensor
        self._error = error

    def tensor(self, name: str) -> Any:
        if name == self._tensor:
            raise self._error
        return super().tensor(name)


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize("error", FAILURES[::2], ids=["full", "interrupt"])
def test_failed_export_leaves_nothing(tmp_path: Path, engine: Any, error: BaseException) -> None:
    expected = StorageError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        export(FailsAt("layers.2.down", error), tmp_path / "tiny", (engine,), "int4")
    assert list(tmp_path.iterdir()) == []


def test_forgotten_commit_writes_nothing(tmp_path: Path) -> None:
    with write_package(tmp_path / "tiny") as writer:
        writer.variant_folder("a")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    stale = tmp_path / ".tiny.partial-dead"
    (stale / "onnx-int4").mkdir(parents=True)
    (stale / "onnx-int4" / "model.onnx").write_bytes(b"half")
    other = tmp_path / ".other.partial-alive"
    other.mkdir()
    write(tmp_path / "tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-alive", "tiny"]


def test_only_packages_and_empty_folders_are_written_over(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    Package.open(tmp_path / "empty").verify()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("full", "file"):
        with pytest.raises(StorageError, match="not a model package"):
            write(tmp_path / name)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write(tmp_path / "file" / "tiny")


def test_export_adds_what_is_missing_and_refuses_another_model(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    steps: list[tuple[str, int, int]] = []
    export(SyntheticCheckpoint("tiny"), target, ("onnx",), "int4")
    export(SyntheticCheckpoint("tiny"), target, ("onnx", "openvino"), "int4", lambda *step: steps.append(step))
    opened = Package.open(target)
    opened.verify()
    assert [variant.name for variant in opened.manifest.variants] == ["onnx-int4", "openvino-int4"]
    assert {what for what, _, _ in steps} == {"openvino-int4"}
    assert steps[-1][1] == steps[-1][2] > 0
    assert opened.manifest.architecture.parameters == 180_800
    with pytest.raises(StorageError, match="another model"):
        export(SyntheticCheckpoint("tiny"), target, ("onnx",), "fp32", provenance={"source": "elsewhere"})
