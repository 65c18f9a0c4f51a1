"""Sentence encoders that throw, give no numbers or hang: who waits is told, and the next text is embedded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from devices.encoder import Encoder
from devices.errors import EngineError
from edge_runtime import encoder_thread
from edge_runtime.embedder import EdgeEmbedder
from edge_runtime.encoder_thread import EncoderThread
from edge_runtime.errors import EngineStopped, StepTimeout
from edge_runtime.exporting import export_package
from edge_runtime.server.app import create_app
from edge_runtime.step_watch import UNMEASURED
from edge_runtime.stuck import any_stuck
from tests.exporters.encoder_folder import write_folder
from tests.server.served import CHAT, FakeModel, error_of, running, wait_until
from tests.server.test_leaving import sent
from tests.server.test_metrics import value
from tests.survive.test_hanging_steps import Hands

HANGS, THROWS, NONSENSE = 1, 2, 3
"""Tokens that make a batch do so."""
DEVICE = "fake:cpu"


class Fake(Encoder):
    """A text's vector is its first token, twice."""

    def __init__(self) -> None:
        self.closed = False
        self.hangs, self.go_on = threading.Event(), threading.Event()

    def embed(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        first = [text[0] for text in texts]
        if HANGS in first:
            self.hangs.set()
            assert self.go_on.wait(60)
        if THROWS in first:
            raise EngineError("it cannot be computed")
        vectors = np.repeat(np.array(first, np.float32)[:, None], 2, axis=1)
        vectors[np.array(first) == NONSENSE] = np.nan
        return vectors

    def _run(self, inputs: object) -> NDArray[np.float32]:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


@contextmanager
def open_thread(timeout: float | None = 30) -> Iterator[tuple[EncoderThread, Fake, Hands]]:
    encoder, hands = Fake(), Hands()
    thread = EncoderThread(encoder, DEVICE, timeout, hands.heartbeat)
    try:
        yield thread, encoder, hands
    finally:
        encoder.go_on.set()
        thread.close()
        wait_until(lambda: encoder.closed and not any_stuck())


def first(vectors: NDArray[np.float32]) -> list[float]:
    return [float(each) for each in vectors[:, 0]]


@pytest.mark.parametrize(
    ("token", "words"), [(THROWS, "cannot be computed"), (NONSENSE, "fake:cpu gave no numbers for a text")]
)
def test_what_fails_fails_alone(token: int, words: str) -> None:
    with open_thread() as (thread, _, _):
        for _ in range(5):
            with pytest.raises(EngineError, match=words):
                thread.embed([[7], [token]])
            assert first(thread.embed([[8], [9, 3]])) == [8, 9]
        assert thread.alive


def test_many_at_once_get_their_own() -> None:
    with open_thread() as (thread, _, _), ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda number: first(thread.embed([[number], [number + 1]])), range(10, 200)))
        assert found == [[number, number + 1] for number in range(10, 200)]


def test_a_batch_that_hangs_ends_all_that_wait() -> None:
    with open_thread() as (thread, encoder, hands), ThreadPoolExecutor(3) as threads:
        hung = threads.submit(thread.embed, [[HANGS]])
        assert encoder.hangs.wait(60)
        waiting = [threads.submit(thread.embed, [[9]]) for _ in range(2)]
        wait_until(lambda: len(thread._asked) == 2)
        hands.wait(30 * UNMEASURED + 2)
        with pytest.raises(StepTimeout, match="fake:cpu hangs: a step of 1 token has taken"):
            hung.result(60)
        for each in waiting:
            with pytest.raises(EngineStopped, match="start the program anew"):
                each.result(60)
        with pytest.raises(EngineStopped, match="hangs"):
            thread.embed([[9]])
        assert not thread.alive
        assert "hangs" in (thread.failure or "")
        assert not encoder.closed
        encoder.go_on.set()  # and now it comes back
        wait_until(lambda: encoder.closed)


def test_without_a_limit_it_may_take_what_it_takes() -> None:
    with open_thread(None) as (thread, encoder, hands), ThreadPoolExecutor(1) as threads:
        slow = threads.submit(thread.embed, [[HANGS]])
        assert encoder.hangs.wait(60)
        hands.wait(10_000)
        encoder.go_on.set()
        assert first(slow.result(60)) == [HANGS]


def test_closing_does_not_wait_for_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_thread, "CLOSING_S", 0)
    with open_thread() as (thread, encoder, hands), ThreadPoolExecutor(3) as threads:
        hung, waiting = threads.submit(thread.embed, [[HANGS]]), threads.submit(thread.embed, [[9]])
        assert encoder.hangs.wait(60)
        closing = threads.submit(thread.close)
        wait_until(lambda: not thread.alive)
        while not closing.done():
            hands.wait(1)
            time.sleep(0.01)
        with pytest.raises(StepTimeout):
            hung.result(60)
        with pytest.raises(EngineStopped, match="was closed"):
            waiting.result(60)
        assert thread.failure is None  # somebody wanted it


@pytest.fixture
def embedder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EdgeEmbedder]:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    write_folder(tmp_path / "source")
    export_package(str(tmp_path / "source"), tmp_path / "model", engines=["onnx"], weights="fp32")
    with EdgeEmbedder(str(tmp_path / "model")) as opened:
        yield opened


def test_who_waits_for_an_encoder_keeps_no_chat_waiting(embedder: EdgeEmbedder) -> None:
    """However many these are: threads are few, and a model is not closed without one either."""
    encoder, hands, model = Fake(), Hands(), FakeModel()
    embedder._encoder.close()
    embedder._encoder = EncoderThread(encoder, DEVICE, 30, hands.heartbeat)
    embedder.hidden_size = 2
    body = {"model": embedder.model_id, "input": [[HANGS]]}
    with running(create_app(model, embedders=[embedder])) as url, ExitStack() as clients:
        for _ in range(60):
            clients.enter_context(sent(url, "/v1/embeddings", body))
        assert encoder.hangs.wait(60)
        wait_until(lambda: value(httpx.get(f"{url}/metrics").text, "edge_glm_http_requests_in_flight") == 61)
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=20).status_code == 200
        encoder.go_on.set()
        assert httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).status_code == 200
    model.close()


@pytest.mark.parametrize(("fault", "alive"), [("nan", True), ("hang", False)])
def test_over_http_health_tells(embedder: EdgeEmbedder, fault: str, alive: bool) -> None:
    encoder, hands = Fake(), Hands()
    embedder._encoder.close()
    embedder._encoder = EncoderThread(encoder, DEVICE, 30, hands.heartbeat)
    embedder.hidden_size = 2
    with running(create_app(FakeModel(), embedders=[embedder])) as url, ThreadPoolExecutor(1) as threads:
        body = {"model": embedder.model_id, "input": [[HANGS if fault == "hang" else NONSENSE]]}
        asked = threads.submit(httpx.post, f"{url}/v1/embeddings", json=body, timeout=60)
        if fault == "hang":
            assert encoder.hangs.wait(60)
            hands.wait(30 * UNMEASURED + 2)
        answer = asked.result(60)
        assert answer.status_code == 500
        assert "fake:cpu" in error_of(answer)["message"]
        assert httpx.get(f"{url}/health/live").status_code == (200 if alive else 503)
        again = httpx.post(f"{url}/v1/embeddings", json=body | {"input": [[9]]}, timeout=60)
        assert again.status_code == (200 if alive else 503)
        encoder.go_on.set()
