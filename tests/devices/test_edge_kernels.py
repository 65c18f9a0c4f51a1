"""Where our own kernels are, and what is said where they are not."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from devices import edge_kernels
from devices.discovery import list_devices
from devices.errors import DeviceUnavailable
from devices.registry import choose_device
from tests.conftest import usable

X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library for this Python, on a processor for which it has kernels."""
    monkeypatch.setattr(edge_kernels, "_FOLDER", tmp_path)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    holds(monkeypatch, b"avx2")
    library = tmp_path / f"_kernels{EXTENSION_SUFFIXES[0]}"
    library.touch()
    return library


def holds(monkeypatch: pytest.MonkeyPatch, instructions: bytes) -> None:
    def load(library: Path) -> Any:
        assert library.exists()
        return SimpleNamespace(edge_kernels_instructions=lambda: instructions)

    monkeypatch.setattr(edge_kernels, "_load", load)


def test_the_library_is_found_and_asked(built: Path) -> None:
    (built.parent / "_kernels.cpython-27-other.so").touch()
    assert edge_kernels.kernels_library() == built
    assert edge_kernels.instructions() == "avx2"
    device = choose_device("edge:cpu")
    assert (device.engine, device.hardware) == ("onnxruntime-edge", "CPU with Edge-GLM's kernels (avx2)")
    assert choose_device("auto").name == "edge:cpu"
    assert choose_device("cpu", {"onnxruntime", "openvino"}).name == "onnxruntime:cpu"


def test_not_built(built: Path) -> None:
    built.unlink()
    with pytest.raises(DeviceUnavailable, match=r"without a C\+\+ compiler.* pip install .*--device onnxruntime:cpu"):
        choose_device("edge:cpu")
    assert choose_device("auto").name == "onnxruntime:cpu"
    (device,) = (device for device in list_devices() if device.name == "edge:cpu")
    assert not device.ready


def test_a_processor_that_is_too_old(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds(monkeypatch, b"")
    for ask in (edge_kernels.kernels_library, edge_kernels.instructions):
        with pytest.raises(DeviceUnavailable, match=r"AVX2 or AVX-512 VNNI.*use --device onnxruntime:cpu"):
            ask()


def test_another_architecture(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(DeviceUnavailable, match=r"x86-64 processors, and this one is aarch64; .*onnxruntime:cpu"):
        edge_kernels.kernels_library()


def test_a_library_that_does_not_load(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(edge_kernels, "_FOLDER", built.parent)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    built.write_bytes(b"no library")
    with pytest.raises(DeviceUnavailable, match=r"do not load \(.*\); run pip install .*--device onnxruntime:cpu"):
        edge_kernels.kernels_library()


def test_a_library_of_another_version(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_kernels, "_load", lambda library: SimpleNamespace())
    with pytest.raises(DeviceUnavailable, match="do not load"):
        edge_kernels.instructions()


def test_without_onnxruntime(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceUnavailable, match=r"onnxruntime does not load .*pip install onnxruntime"):
        choose_device("edge:cpu")


@pytest.mark.skipif(not X86, reason="the kernels are for x86-64")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_where_there_is_a_compiler_there_are_kernels() -> None:
    """Building is optional, so that nothing else would notice that it fails."""
    assert edge_kernels._find().is_file()


@pytest.mark.parametrize("instructions", ["", "avx2"])
def test_what_the_instructions_can_do_is_measured(instructions: str) -> None:
    usable("edge:cpu")
    script = "from devices.edge_kernels import peak_rate as p; print(*(p(1, floats=f, seconds=0.01) for f in (0, 1)))"
    environment = {**os.environ, "EDGE_KERNELS_INSTRUCTIONS": instructions}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    integers, floats = map(float, done.stdout.split())
    assert integers > floats > 1e8  # bytes lie four to a float
