"""README's examples run as they stand, on the real model."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EDGE_GLM = [sys.executable, "-m", "edge_runtime.cli.main"]


def example(heading: str) -> str:
    """The first Python block under ``heading``."""
    found = re.search(rf"^## {heading}\n.*?```python\n(.*?)```", README, re.M | re.S)
    assert found, f"README has no Python example under {heading}"
    return found[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home of its own with the model pulled as a user would."""
    home = tmp_path_factory.mktemp("readme")
    environment = os.environ | {"EDGE_GLM_HOME": str(home)}
    environment.pop("OPENAI_API_KEY", None)
    run([*EDGE_GLM, "pull", "smollm2:135m"], environment)
    return environment


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def port(environment: dict[str, str]) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    server = subprocess.Popen([*EDGE_GLM, "serve", "smollm2:135m", "--port", str(port)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait(30)


def test_python(environment: dict[str, str]) -> None:
    output = run([sys.executable, "-c", example("In Python")], environment)
    assert "Paris" in output
    assert "stop" in output or "length" in output


def test_http(environment: dict[str, str], port: int) -> None:
    code = example("Over HTTP")
    assert ":8080" in code
    output = run([sys.executable, "-W", "error", "-c", code.replace(":8080", f":{port}")], environment)
    assert "heat" in output.lower()


def test_the_main_job(environment: dict[str, str]) -> None:
    command = re.search(r'bin/edge-glm (run .*)"\n', README)
    assert command
    question = ["run", "smollm2:135m", "Why is the sky blue?", "--temperature", "0", "--max-tokens", "40"]
    assert command[1].startswith("run smollm2:135m")
    assert "light" in run([*EDGE_GLM, *question], environment)
