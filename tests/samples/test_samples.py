"""Every sample, as it stands, with a real model."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import paho.mqtt.client as mqtt
import pytest

from edge_runtime.llm import EdgeLLM
from edge_runtime.package import Package
from edge_runtime.sampling import SamplingParams

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"
MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_GLM_")}
    return {**kept, "EDGE_GLM_HOME": str(tmp_path_factory.mktemp("home")), "PYTHONPATH": str(ROOT)}


def run(environment: dict[str, str], name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(SAMPLES / name), *words],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_one_screen_each() -> None:
    """And each is run by a test here."""
    tested = Path(__file__).read_text(encoding="utf-8")
    for file in SAMPLES.rglob("*"):
        if file.is_file() and "stage" not in file.parts and "__pycache__" not in file.parts:
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 90
            assert file.stem in tested or file.name == "policy.toml", file


def test_embed(environment: dict[str, str], smollm2_package: Package) -> None:
    *_, city = run(environment, "embed.py", str(smollm2_package.folder)).splitlines()
    assert city.strip()


def test_stream_asyncio(environment: dict[str, str], smollm2_package: Package) -> None:
    """Each answer is that of its question alone. Which that is differs: two first words are near each other."""
    *lines, cancelled = run(environment, "stream_asyncio.py", str(smollm2_package.folder)).splitlines()
    with EdgeLLM(str(smollm2_package.folder)) as llm:
        for question, shown in zip(lines[::2], lines[1::2], strict=True):
            params = SamplingParams(temperature=0, max_tokens=40)
            with llm.start_chat([{"role": "user", "content": question}], params) as generation:
                assert shown.split() == "".join(chunk.text for chunk in generation).split()
    assert len(lines) == 6
    assert cancelled == "cancelled: True"


def test_sensor_loop(environment: dict[str, str], smollm2_package: Package) -> None:
    words = (str(smollm2_package.folder), "--every", "0.5", "--rounds", "2")
    first, second = re.findall(r"^\[lowest .*? degrees\] .+$", run(environment, "sensor_loop.py", *words), re.M)
    assert first
    assert second


def test_notes_assistant(environment: dict[str, str], smollm2_package: Package, tmp_path: Path) -> None:
    (tmp_path / "garden.md").write_text("The apple tree by the fence was planted in 1987.\n\nThe pond is 2 m deep.")
    (tmp_path / "car.txt").write_text("The car's next inspection is in May.")
    (tmp_path / "kitchen.txt").write_text("The oven's warranty ended last year.")
    text = run(
        environment, "notes_assistant.py", str(tmp_path), "How old is the fruit tree?",
        "--model", str(smollm2_package.folder),
    )  # fmt: skip
    answer, sources = text.strip().rsplit("\n", 1)
    assert answer.strip()
    assert sources.startswith("[garden.md")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(condition: Any, seconds: float = 100) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def reachable(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, **quiet) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def test_fastapi_app(environment: dict[str, str], smollm2_package: Package) -> None:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(SAMPLES), "fastapi_app:app", "--port", str(port)]
    with started(command, environment | {"EDGE_GLM_MODEL": str(smollm2_package.folder)}):
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: reachable(f"{url}/llm/health"))
        title = httpx.post(f"{url}/title", json={"text": "The cat sat on the mat."}, timeout=60).json()["title"]
        assert title
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        answer = httpx.post(f"{url}/llm/v1/chat/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] <= 4


def test_tiered(environment: dict[str, str], smollm2_package: Package, tmp_path: Path) -> None:
    """tiered.toml, with the hall on this machine."""
    hall, here = free_port(), free_port()
    policy = (SAMPLES / "tiered.toml").read_text(encoding="utf-8")
    policy = policy.replace("hall.local:8080", f"127.0.0.1:{hall}").replace("smollm2:360m", "smollm2")
    (tmp_path / "tiered.toml").write_text(policy)
    serve = [sys.executable, "-m", "edge_runtime.cli.main", "serve", str(smollm2_package.folder), "--port"]
    with_policy = [*serve, str(here), "--policy", str(tmp_path / "tiered.toml")]
    with (
        started([*serve, str(hall)], environment | {"EDGE_GLM_API_KEY": "s3cret"}),
        started(with_policy, environment | {"HALL_KEY": "s3cret"}),
    ):
        for port in (hall, here):
            wait_for(lambda port=port: reachable(f"http://127.0.0.1:{port}/health"))

        def tier(question: str) -> str:
            body = {"model": "smollm2", "messages": [{"role": "user", "content": question}], "max_tokens": 4}
            answer = httpx.post(f"http://127.0.0.1:{here}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.headers["x-edge-glm-tier"]

        assert tier("Hi") == "here"
        assert tier("Tell me about this: " + "a word and another, " * 30) == "hall"


def test_ray_serve(environment: dict[str, str], smollm2_package: Package) -> None:
    """Two replicas on this machine; one is killed, and the other answers on."""
    pytest.importorskip("ray")
    port = free_port()
    command = [sys.executable, str(SAMPLES / "ray_serve.py"), str(smollm2_package.folder), "--port", str(port)]
    with started(command, environment):
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: reachable(f"{url}/health"), 150)
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
        texts, starts = set(), set()
        for _ in range(12):
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            texts.add(answer.json()["choices"][0]["message"]["content"])
            page = httpx.get(f"{url}/metrics").text
            starts |= set(re.findall(r"^process_start_time_seconds (\S+)$", page, re.M))
        assert len(texts) == 1
        assert len(starts) == 2
        subprocess.run(["pkill", "-o", "-KILL", "-f", "ray::ServeReplica:default:EdgeGlm"], check=True)
        wait_for(lambda: httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200)


@pytest.mark.skipif(MOSQUITTO is None, reason="there is no mosquitto here")
def test_mqtt_app(environment: dict[str, str], smollm2_package: Package, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
    broker = [str(MOSQUITTO), "-c", str(tmp_path / "mosquitto.conf")]
    app = [sys.executable, str(SAMPLES / "mqtt_app.py"), "--ref", str(smollm2_package.folder), "--port", str(port)]
    heard: Queue[tuple[str, str]] = Queue()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.reconnect_delay_set(1, 1)
    client.on_connect = lambda *_: client.subscribe([("edge/answer/#", 1), ("edge/status", 1)])
    client.on_message = lambda _, __, message: heard.put((message.topic, message.payload.decode()))

    def until(done: Any) -> list[tuple[str, Any]]:
        told = []
        while True:
            topic, text = heard.get(timeout=60)
            told.append((topic, text if topic == "edge/status" else json.loads(text)))
            if done(*told[-1]):
                return told

    def answered(id: str) -> tuple[str, dict[str, Any]]:
        told = [what for topic, what in until(lambda t, w: t == f"edge/answer/{id}" and ("done" in w or "error" in w))
                if topic == f"edge/answer/{id}"]  # fmt: skip
        return "".join(piece.get("text", "") for piece in told), told[-1]

    def online(topic: str, what: Any) -> bool:
        return (topic, what) == ("edge/status", "online")

    with started(broker, environment) as first, started(app, environment) as running:
        wait_for(lambda: client.connect_async("127.0.0.1", port) or client.loop_start() or True)
        until(online)
        client.publish("edge/ask/1", "What is the capital of France?", qos=1)
        text, last = answered("1")
        assert text.strip()
        assert last["done"] is True
        client.publish("edge/ask/2", json.dumps({"prompt": "Hi", "max_tokens": 3}), qos=1)
        assert answered("2")[1]["finish"] in ("length", "stop")
        for wrong in ('{"text": 3}', '{"prompt": "x", "max_tokens": 0}', '{"prompt"', b"\xff"):
            client.publish("edge/ask/3", wrong, qos=1)
            assert "error" in answered("3")[1]

        long = json.dumps({"prompt": "Tell me a long story.", "max_tokens": 2000})
        client.publish("edge/ask/long", long, qos=1)
        until(lambda topic, what: topic == "edge/answer/long")
        for number in range(9):  # eight may wait
            client.publish(f"edge/ask/w{number}", json.dumps({"prompt": "Hi", "max_tokens": 2}), qos=1)
        assert "too many" in answered("w8")[1]["error"]
        client.publish("edge/cancel/long", "", qos=1)
        assert answered("w7")[1]["done"] is True

        first.terminate()  # the broker goes and comes again: so does the app
        first.wait(20)
        with started(broker, environment):
            until(online)
            client.publish("edge/ask/4", json.dumps({"prompt": "Hi", "max_tokens": 2}), qos=1)
            assert answered("4")[1]["done"] is True
            running.send_signal(signal.SIGKILL)  # it vanishes: the broker tells, when it has missed it for a while
            until(lambda topic, what: (topic, what) == ("edge/status", "offline"))
            client.disconnect()
            client.loop_stop()


def test_the_service_unit() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(SAMPLES / "deploy" / "edge-glm.service")
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    words = unit["Service"]["ExecStart"].split()[1:]
    from edge_runtime.cli.parser import make_parser

    parsed = make_parser().parse_args(words)
    assert (parsed.command, parsed.refs, parsed.memory_budget) == ("serve", ["smollm2:135m"], "1GiB")
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(SAMPLES / "deploy" / "edge-glm.service")],
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        problems = [
            line for line in done.stderr.splitlines() if "edge-glm.service" in line and "bin/edge-glm" not in line
        ]
        assert problems == []


def test_the_containerfile() -> None:
    """Its commands are ours; nothing here can build it."""
    text = (SAMPLES / "deploy" / "Containerfile").read_text(encoding="utf-8")
    words = json.loads(re.search(r"^CMD (\[.*\])$", text, re.M)[1])  # type: ignore[index]
    from edge_runtime.cli.parser import make_parser

    assert make_parser().parse_args(words).host == "0.0.0.0"
    assert "USER edge" in text
