"""SIGTERM, SIGSTOP and SIGCONT to a server that is in the middle of everything."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_runtime.deferred.queue import Queue
from edge_runtime.server.app import create_app
from edge_runtime.server.run import make_server
from edge_runtime.server.supervisor import Supervisor
from tests.server.served import FakeModel, running, wait_until
from tests.survive.loaded_server import STEP_TIMEOUT_S

ROOT = Path(__file__).parents[2]
ASKED: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@contextmanager
def loaded(folder: Path, *, environ: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its URL."""
    command = [sys.executable, "-m", "tests.survive.loaded_server", str(folder)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (environ or {}),
    ) as process:
        assert process.stderr is not None
        lines: list[str] = []
        try:
            while " on http://" not in (line := process.stderr.readline()):
                lines.append(line)
                assert process.poll() is None, "".join(lines)
            url = line.split(" on ")[1].split()[0]
            yield process, url
        finally:
            process.kill()


class Load:
    """Requests, each on a thread of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._threads = ThreadPoolExecutor(64)
        self.answers: dict[str, Future[httpx.Response]] = {}

    def post(self, name: str, path: str, body: dict[str, Any]) -> None:
        self.answers[name] = self._threads.submit(httpx.post, self._url + path, json=body, timeout=60)

    def chat(self, name: str, **more: Any) -> None:
        self.post(name, "/v1/chat/completions", ASKED | more)

    def everything(self) -> None:
        self.chat("short stream", stream=True, max_tokens=20)
        self.chat("long stream", stream=True, max_tokens=400)
        self.chat("three streams", stream=True, max_tokens=400, n=3)
        self.chat("tools", stream=True, max_tokens=400, tools=[TOOL], tool_choice="required", ignore_eos=False)
        self.chat("whole", max_tokens=400)
        self.post("text", "/v1/completions", {"model": "fake", "prompt": "Hi", "max_tokens": 400, "stream": True})
        self.post("responses", "/v1/responses", {"model": "fake", "input": "Hi", "stream": True})
        self.post("ollama", "/api/chat", {"model": "fake", "messages": ASKED["messages"]})
        self.post("embeddings", "/v1/embeddings", {"model": "encoder", "input": ["a"] * 50})
        self.chat("opening", model="huge", max_tokens=3)
        self.chat("opening a stream", model="huge", max_tokens=3, stream=True)
        for number in range(30):
            self.chat(f"waiting {number}", stream=number % 2 == 0, max_tokens=450)


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{model="fake"'))


def last_events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")][-2:]


def ended_properly(name: str, answer: httpx.Response) -> str:
    """ "whole" or "told"; fails for everything else."""
    if answer.status_code != 200:
        assert answer.status_code == 503, (name, answer.text)
        error = answer.json()["error"]
        assert error if isinstance(error, str) else error["message"], name
        return "told"
    if "ndjson" in answer.headers["content-type"]:
        last = json.loads(answer.text.splitlines()[-1])
        assert last.get("done") or last["error"], name
        return "whole" if last.get("done") else "told"
    if "event-stream" not in answer.headers["content-type"]:
        answer.json()
        return "whole"
    events = last_events(answer.text)
    if events[-1] == "[DONE]" or json.loads(events[-1]).get("type") in ("response.completed", "response.incomplete"):
        return "whole"
    last = json.loads(events[-1])
    assert "error" in last or last["type"] in ("error", "response.failed"), (name, events)
    return "told"


def test_sigterm_in_the_middle_of_everything(tmp_path: Path) -> None:
    with loaded(tmp_path) as (process, url):
        load = Load(url)
        deferred = [
            httpx.post(f"{url}/v1/chat/completions", json=ASKED | {"model": "later", "max_tokens": 200}).json()["id"]
            for _ in range(12)
        ]
        load.everything()
        wait_until(lambda: metric(url, "edge_glm_requests_running") >= 10)
        wait_until(lambda: metric(url, "edge_glm_requests_waiting") >= 10)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        out, err = process.communicate(timeout=60)
        taken = time.monotonic() - sent
        assert (process.returncode, out.splitlines()[-1]) == (0, "closed"), err
        assert "Traceback" not in err, err
        ends = {name: ended_properly(name, future.result(60)) for name, future in load.answers.items()}
    assert ends["short stream"] == "whole"
    assert ends["long stream"] == ends["three streams"] == ends["whole"] == ends["embeddings"] == "told"
    assert ends["opening"] == ends["opening a stream"] == "told"
    assert "told" in {end for name, end in ends.items() if name.startswith("waiting")}
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as ledger:
        assert ledger.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    queue = Queue(next(tmp_path.glob("*deferred*.sqlite")))
    states = {entry.id: entry.state for entry in queue.entries()}
    queue.close()
    assert list(states) == deferred
    assert set(states.values()) <= {"queued", "done"}
    assert "queued" in states.values()
    assert taken < 30  # a minute would be the model that was being opened


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_second_signal_ends_it_at_once(number: signal.Signals, tmp_path: Path) -> None:
    with loaded(tmp_path) as (process, url):
        load = Load(url)
        load.chat("opening", model="huge", max_tokens=3)
        load.chat("long", stream=True, max_tokens=450)
        wait_until(lambda: metric(url, "edge_glm_requests_running"))
        assert process.stderr is not None
        process.send_signal(number)
        while "Shutting down" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == (-signal.SIGTERM if number == signal.SIGTERM else 0)
        for future in load.answers.values():
            assert future.exception(60) is not None or future.result().status_code in (200, 500, 503)


def test_sigterm_while_a_model_is_loaded(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from edge_runtime.cli import main, opening\n"
        "def load(*given):\n"
        "    print('loading', flush=True)\n"
        "    time.sleep(60)\n"
        "opening.open_model = load\n"
        "opening._is_encoder = lambda *given: False\n"
        "sys.exit(main.main(['serve', 'anything', '--port', '0']))\n"
    )
    environ = os.environ | {"EDGE_GLM_HOME": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGTERM)
        try:
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err


def test_a_process_that_is_stopped_and_goes_on_goes_on(tmp_path: Path) -> None:
    """Longer than a step may take, and than an unused model stays open."""
    with loaded(tmp_path) as (process, url):
        load = Load(url)
        httpx.post(f"{url}/v1/chat/completions", json=ASKED | {"model": "small", "max_tokens": 2})
        load.chat("stream", stream=True, max_tokens=300)
        wait_until(lambda: metric(url, "edge_glm_requests_running"))
        opened = [model["name"] for model in httpx.get(f"{url}/api/ps").json()["models"]]
        assert "small" in opened
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as left:
            left.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-le")
            process.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * STEP_TIMEOUT_S + 1)
        process.send_signal(signal.SIGCONT)
        opened = [model["name"] for model in httpx.get(f"{url}/api/ps", timeout=30).json()["models"]]
        assert "small" in opened  # nobody had the time to use it
        assert last_events(load.answers["stream"].result(60).text)[-1] == "[DONE]"
        assert httpx.get(f"{url}/health").status_code == 200
        assert "aside" not in httpx.get(f"{url}/health").text
        wait_until(lambda: "small" not in httpx.get(f"{url}/api/ps").text)  # but in the end it goes
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.splitlines()[-1]) == (0, "closed"), err
        assert "hangs" not in err


# --- the service manager ----------------------------------------------------------------------------------------------


@contextmanager
def manager(folder: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """systemd's side of the notifications, and the environment that it gives."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(folder / "notify"))
        told.settimeout(30)
        yield told, {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "100000"}


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    with manager(tmp_path) as (told, environ), loaded(tmp_path, environ=environ) as (process, _):
        assert told.recv(100) == b"READY=1"
        assert [told.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        process.send_signal(signal.SIGTERM)
        while (word := told.recv(100)) == b"WATCHDOG=1":
            pass
        assert word == b"STOPPING=1"
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_it_hears_nothing_more_once_a_model_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    with manager(tmp_path) as (told, environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with running(create_app(model)):
            assert [told.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
            model.engine._estate.failure = "it hangs"
            told.settimeout(1)
            with suppress(TimeoutError):  # what was said before
                for _ in range(100):
                    assert told.recv(100) == b"WATCHDOG=1"
                pytest.fail("it goes on")
            told.settimeout(30)
        assert told.recv(100) == b"STOPPING=1"
    model.close()


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "1000000"}, None),
        ({"NOTIFY_SOCKET": "/nowhere"}, None),
        ({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "60000000"}, 30.0),
        ({"NOTIFY_SOCKET": "@edge-glm-test", "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_where_nobody_listens_nothing_happens(environ: dict[str, str], interval: float | None) -> None:
    supervisor = Supervisor(environ)
    assert supervisor.interval == interval
    supervisor.tell("READY=1")


def test_an_abstract_address() -> None:
    name = f"edge-glm-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"\0{name}")
        told.settimeout(30)
        Supervisor({"NOTIFY_SOCKET": f"@{name}"}).tell("READY=1", "STATUS=well")
        assert told.recv(100) == b"READY=1\nSTATUS=well"


def test_signals_are_left_alone_off_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    model = FakeModel()
    server = make_server(create_app(model), "warning")
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    assert signal.getsignal(signal.SIGTERM) is before
    server.should_exit = True
    thread.join(30)
    model.close()
