"""Models that are opened on demand: once, kept for a while, closed by need, and never under an answer."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from edge_runtime import store
from edge_runtime.cli.opening import offers
from edge_runtime.errors import BudgetError, ConfigError, EngineStopped, InvalidRequest
from edge_runtime.exporting import export_package
from edge_runtime.package import Package
from edge_runtime.paths import home
from edge_runtime.server.app import create_app
from edge_runtime.server.shelf import FOREVER, Offer, Shelf
from edge_runtime.server.wire.ollama import seconds_of
from edge_runtime.settings import Settings
from tests.exporters.encoder_folder import write_folder
from tests.server.served import CHAT, FakeModel, error_of, running, wait_until

ROOT = Path(__file__).parents[2]


class Store:
    """Models that can be opened, of which ``room`` fit at once."""

    def __init__(self, *names: str, room: int = 9, keep_alive: float = 300, pinned: FakeModel | None = None) -> None:
        self.opened: list[str] = []
        self.live: dict[str, FakeModel] = {}
        self.gate = threading.Event()
        self.gate.set()
        self._room = room
        offers: dict[str, Offer[Any]] = {
            name: Offer(lambda name=name: self._open(name), FakeModel.facts.fget(FakeModel(name)), 7) for name in names
        }
        self.shelf = Shelf([] if pinned is None else [pinned], (), offers, {}, keep_alive)

    def _open(self, name: str) -> FakeModel:
        self.live = {other: model for other, model in self.live.items() if model.ready}
        if len(self.live) >= self._room:
            raise BudgetError("there is no room")
        self.opened.append(name)
        time.sleep(0.05)
        self.live[name] = FakeModel(name, before_forward=lambda batch: self.gate.wait(30) and None)
        return self.live[name]

    @contextmanager
    def served(self) -> Iterator[str]:
        with running(create_app(self.shelf)) as url:
            yield url
        self.shelf.close()


def ask(url: str, model: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"model": model} | more, timeout=60)


def open_now(url: str) -> list[str]:
    return [model["name"] for model in httpx.get(f"{url}/api/ps").json()["models"]]


def test_opened_once_when_somebody_asks() -> None:
    store = Store("a", "b")
    with store.served() as url:
        listed = httpx.get(f"{url}/v1/models").json()["data"]
        assert [(model["id"], model["created"], model["placement"]) for model in listed] == [
            ("a", 7, None),
            ("b", 7, None),
        ]
        assert open_now(url) == []
        assert httpx.get(f"{url}/health").status_code == 200
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: ask(url, "a"), range(8)))
        assert {answer.status_code for answer in answers} == {200}
        assert store.opened == ["a"]
        assert open_now(url) == ["a"]
        assert httpx.get(f"{url}/v1/models/a").json()["placement"]["device"] == "fake:cpu"
        assert 'model="a"' in httpx.get(f"{url}/metrics").text
        assert ask(url, "c").status_code == 404
    assert not store.live["a"].ready  # the server's end is theirs


def test_nothing_more_is_opened_once_the_server_ends() -> None:
    store = Store("a")

    async def work() -> list[BaseException | object]:
        waiting = [asyncio.create_task(store.shelf.text("a")) for _ in range(9)]
        await asyncio.sleep(0.01)
        store.shelf.stop_opening()
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert all(isinstance(each, EngineStopped) for each in asyncio.run(work()))
    assert len(store.opened) <= 1


def test_one_that_was_used_while_its_closing_waited_stays() -> None:
    store = Store("a", "b", keep_alive=0.2)

    async def work() -> None:
        async with await store.shelf.text("a"):
            pass
        async with store.shelf._opening:  # another is being opened, for long
            await asyncio.sleep(0.4)
            async with await store.shelf.text("a"):
                pass
        await asyncio.sleep(0.05)
        assert store.shelf.place("a").model is not None
        await asyncio.sleep(0.4)
        assert store.shelf.place("a").model is None

    asyncio.run(work())
    assert store.opened == ["a"]


def test_closed_when_nobody_has_used_it_for_a_while() -> None:
    store = Store("a", keep_alive=1)
    with store.served() as url:
        assert ask(url, "a").status_code == 200
        first = store.live["a"]
        assert open_now(url) == ["a"]
        wait_until(lambda: open_now(url) == [])
        assert not first.ready
        assert ask(url, "a").status_code == 200
        assert store.opened == ["a", "a"]


def test_the_one_not_used_for_longest_makes_room() -> None:
    pinned = FakeModel("p")
    store = Store("a", "b", "c", room=2, pinned=pinned)
    with store.served() as url:
        for name in ("a", "b", "a", "p", "c"):
            assert ask(url, name).status_code == 200
        assert sorted(open_now(url)) == ["a", "c", "p"]
        assert store.opened == ["a", "b", "c"]
        assert pinned.ready
    pinned.engine.close()


def test_where_all_are_at_work_there_is_no_room() -> None:
    store = Store("a", "b", room=1)
    with store.served() as url, ThreadPoolExecutor(1) as threads:
        assert ask(url, "a").status_code == 200
        store.gate.clear()
        busy = threads.submit(ask, url, "a")
        wait_until(lambda: httpx.get(f"{url}/api/ps").json()["models"][0]["edge_glm"]["users"] == 1)
        refused = ask(url, "b")
        assert (refused.status_code, error_of(refused)["code"]) == (503, "out_of_memory_budget")
        store.gate.set()
        assert busy.result().status_code == 200
        assert ask(url, "b").status_code == 200
        assert open_now(url) == ["b"]


@pytest.mark.parametrize("stream", [False, True])
def test_never_under_an_answer(stream: bool) -> None:
    store = Store("a")
    with store.served() as url, ThreadPoolExecutor(1) as threads:
        assert ask(url, "a").status_code == 200
        store.gate.clear()
        answer = threads.submit(ask, url, "a", stream=stream, max_tokens=20, ignore_eos=True)
        wait_until(lambda: httpx.get(f"{url}/api/ps").json()["models"][0]["edge_glm"]["users"] == 1)
        stopped = httpx.post(f"{url}/v1/models/stop", json={"model": "a"})
        assert stopped.json() == {"model": "a", "stopped": True}
        first = store.live["a"]
        assert first.ready
        store.gate.set()
        assert answer.result().status_code == 200
        wait_until(lambda: not first.ready)
        assert httpx.post(f"{url}/v1/models/stop", json={"model": "a"}).json()["stopped"] is False
        assert ask(url, "a").status_code == 200


def test_clients_that_leave_leave_nothing_behind() -> None:
    store = Store("a", keep_alive=0.2)
    with store.served() as url:
        assert ask(url, "a").status_code == 200
        store.gate.clear()
        for path in ("/v1/chat/completions", "/api/chat"):
            body = CHAT | {"model": "a", "stream": True}
            body = body if path != "/api/chat" else {"model": "a", "messages": CHAT["messages"]}
            with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.3) as client:
                client.post(url + path, json=body)
        store.gate.set()
        wait_until(lambda: open_now(url) == [])


def test_a_model_that_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("a", room=0)
    with store.served() as url:
        for _ in range(2):
            assert ask(url, "a").status_code == 503
        store._room = 1
        assert ask(url, "a").status_code == 200


def test_pinned_ones_stay() -> None:
    pinned = FakeModel("p")
    with running(create_app(pinned)) as url:
        refused = httpx.post(f"{url}/v1/models/stop", json={"model": "p"})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "model")
        assert httpx.post(f"{url}/v1/models/stop", json={"model": "x"}).status_code == 404
        (told,) = httpx.get(f"{url}/api/ps").json()["models"]
        assert told["edge_glm"]["pinned"] is True
        httpx.post(f"{url}/api/generate", json={"model": "p", "keep_alive": 0})
        assert open_now(url) == ["p"]
    pinned.engine.close()


def test_ollamas_keep_alive() -> None:
    store = Store("a")
    with store.served() as url:
        assert (
            httpx.post(f"{url}/api/generate", json={"model": "a", "keep_alive": "1h"}).json()["done_reason"] == "load"
        )
        expires = httpx.get(f"{url}/api/ps").json()["models"][0]["expires_at"]
        assert expires > time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() + 3000))
        httpx.post(f"{url}/api/chat", json={"model": "a", "messages": [], "keep_alive": 0})
        wait_until(lambda: open_now(url) == [])
        assert httpx.post(f"{url}/api/generate", json={"model": "a", "keep_alive": "soon"}).status_code == 400


def test_durations() -> None:
    told = {"5m": 300, "1h30m": 5400, "10": 10, "2.5s": 2.5, 7: 7, 0: 0, -1: FOREVER, "-1": FOREVER, "-5m": FOREVER}
    for text, seconds in told.items():
        assert seconds_of(text) == seconds
    assert seconds_of(None) is None
    for wrong in ("", "m", "5x", "1m 2s"):
        with pytest.raises(InvalidRequest):
            seconds_of(wrong)


def test_names_are_told_apart() -> None:
    with pytest.raises(ConfigError):
        Shelf([])
    store = Store("a")
    with pytest.raises(ConfigError):
        Shelf(FakeModel("a"), (), {"a": Offer(lambda: FakeModel("a"), store.shelf.texts["a"].facts, 0)})


@pytest.mark.timeout(200)
def test_the_command(tmp_path: Path) -> None:
    environment = {**os.environ, "EDGE_GLM_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    models = tmp_path / "models"
    models.mkdir()
    export_package("synthetic:tiny", models / "one", ["onnxruntime-edge"], "int4")
    export_package("synthetic:tiny", models / "two", ["onnxruntime-edge"], "int4")
    write_folder(tmp_path / "encoder")
    export_package(str(tmp_path / "encoder"), models / "three", ["onnxruntime"], None)

    def command(*words: str) -> list[str]:
        return [sys.executable, "-P", "-m", "edge_runtime.cli.main", *words]

    def tell(*words: str) -> str:
        return subprocess.run(
            command(*words), env=environment, capture_output=True, encoding="utf-8", timeout=60
        ).stdout

    serve = command("serve", "--port", "0", "--device", "cpu", "--memory-budget", "2GiB")
    with subprocess.Popen(
        serve, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stderr is not None
        url = next(found[1] for line in server.stderr if (found := re.search(r"serving on (\S+)", line)))
        try:
            assert tell("ps", "--url", url) == ""
            body = {"prompt": "Hi", "max_tokens": 2}
            for name in ("one", "two"):
                answer = httpx.post(f"{url}/v1/completions", json=body | {"model": name}, timeout=60)
                assert answer.status_code == 200, answer.text
            answer = httpx.post(f"{url}/v1/embeddings", json={"model": "three", "input": "the cat"}, timeout=60)
            assert answer.status_code == 200, answer.text
            told = tell("ps", "--url", url)
            assert [line.split()[0] for line in told.splitlines()] == ["one", "two", "three"]
            assert "closes in 2" in told or "closes in 300 s" in told
            head, *rows = tell("ps", "--requests", "--url", url).splitlines()
            assert head.split() == ["at", "path", "status", "tier", "tokens", "ms", "of", "which"]
            assert [row.split()[1] for row in rows] == ["/v1/embeddings", "/v1/completions", "/v1/completions"]
            assert "load" in rows[1]  # it had to be opened
            assert len(json.loads(tell("ps", "--requests", "--limit", "2", "--json", "--url", url))) == 2
            spans = tmp_path / "spans.json"
            assert "ui.perfetto.dev" in tell("ps", "--chrome", str(spans), "--url", url)
            assert {event["name"] for event in json.loads(spans.read_text())["traceEvents"]} > {
                "load",
                "embed",
                "decode",
            }
            for _ in range(20):
                httpx.post(f"{url}/v1/completions", json=body | {"model": "one"}, timeout=60)
            assert len(tell("ps", "--requests", "--url", url).splitlines()) == 1 + 20
            for limit, told_of in (((), 23), (("--limit", "2"), 2)):  # all, if it is not said
                tell("ps", "--chrome", str(spans), *limit, "--url", url)
                events = json.loads(spans.read_text())["traceEvents"]
                assert sum(event["name"] == "request" for event in events) == told_of
            assert tell("stop", "two", "--url", url) == "two is closed once nobody uses it\n"
            assert [line.split()[0] for line in tell("ps", "--url", url).splitlines()] == ["one", "three"]
            assert tell("stop", "two", "--url", url) == "two was not open\n"
        finally:
            server.terminate()
            server.stderr.close()
    refused = subprocess.run(
        command("ps", "--url", "http://127.0.0.1:9"), env=environment, capture_output=True, encoding="utf-8", timeout=60
    )
    assert refused.returncode == 1
    assert "there is no server at http://127.0.0.1:9" in refused.stderr


def test_the_same_model_on_several_devices(tmp_path: Path) -> None:
    """``serve --also-on``: a request chooses model and device by one name, and the other opens when it is asked."""
    environment = {**os.environ, "EDGE_GLM_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "edge_runtime.cli.main", "serve", "synthetic:tiny", "--port", "0"]
    command += ["--device", "edge:cpu"]
    with subprocess.Popen(
        [*command, "--also-on", "openvino:cpu"], env=environment, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        url = next(found[1] for line in server.stderr if (found := re.search(r"serving on (\S+)", line)))
        try:
            listed = {each["id"]: each.get("placement") for each in httpx.get(f"{url}/v1/models").json()["data"]}
            assert listed.keys() == {"synthetic:tiny", "synthetic:tiny@openvino:cpu"}
            assert listed["synthetic:tiny@openvino:cpu"] is None  # not open yet
            for name, device in (("synthetic:tiny", "edge:cpu"), ("synthetic:tiny@openvino:cpu", "openvino:cpu")):
                body = {"model": name, "prompt": "Hi", "max_tokens": 2, "temperature": 0}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
                assert answer.status_code == 200, answer.text
                assert answer.json()["model"] == name
                open_now = {each["name"]: each["edge_glm"] for each in httpx.get(f"{url}/api/ps").json()["models"]}
                assert open_now[name]["device"] == device
                assert open_now[name]["pinned"] == (device == "edge:cpu")
        finally:
            server.terminate()
            server.stderr.close()
    for device, told in (("toaster", "unknown device 'toaster'"), ("onnxruntime:coreml", "cannot be used here")):
        done = subprocess.run(
            [*command, "--also-on", device], env=environment, capture_output=True, encoding="utf-8", timeout=60
        )
        assert done.returncode == 1
        assert told in done.stderr


def test_models_that_call_themselves_alike_are_offered_under_their_folders_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    package, _ = store.Store(home()).ensure("synthetic:tiny", "onnxruntime")
    other = package.folder.with_name("hf-other-1")
    shutil.copytree(package.folder, other)
    texts, _ = offers(Settings(), [])
    assert texts.keys() == {"synthetic:tiny", "hf-other-1"}
    opened: Any = SimpleNamespace(package=Package.open(other), model_id="synthetic:tiny")
    texts, _ = offers(Settings(), [opened])
    assert texts.keys() == {package.folder.name}
