"""Load on servers: our own over the fake decoder, and one that misbehaves to order."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from edge_runtime.bench.client import Client, RequestFailed
from edge_runtime.bench.job import Goodput, LoadJob
from edge_runtime.bench.load import _most_at_once, run
from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.server.app import create_app
from tests.server.served import FakeModel, running

SHAPE: dict[str, Any] = {"prompt_tokens": 100, "new_tokens": 8, "requests": 6}


@pytest.fixture(scope="module")
def model() -> Iterator[FakeModel]:
    model = FakeModel()
    yield model
    model.engine.close()


@pytest.fixture(scope="module")
def url(model: FakeModel) -> Iterator[str]:
    with running(create_app(model)) as url:
        yield url


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_closed_loop(url: str, endpoint: Any) -> None:
    result = run(LoadJob(url=url, endpoint=endpoint, concurrency=3, seed=5, **SHAPE))
    assert (result.model, result.url, result.device) == ("fake", url, None)
    assert 75 <= result.prompt_tokens <= 125
    assert result.new_tokens == 8
    assert (result.requests, result.errors) == (6, {})
    assert 1 <= result.concurrency <= 3
    assert result.ttft_ms is not None
    assert result.tpot_ms is not None
    assert 0 < result.ttft_ms.p50 <= result.ttft_ms.p95 <= result.ttft_ms.p99
    assert 0 < result.tpot_ms.p50 <= result.tpot_ms.p99
    assert result.request_rate is not None
    assert result.output_tps == pytest.approx(result.request_rate * 8)
    assert len(result.samples.ttft_ms) == 6
    assert (result.goodput, result.prefill_tps, result.peak_rss_bytes) == (None, None, None)


def test_open_loop(url: str) -> None:
    job = LoadJob(url=url, rate=200.0, goodput=Goodput(ttft=60_000, tpot=60_000), **SHAPE)
    result = run(job)
    assert (result.rate, result.requests) == (200.0, 6)
    assert result.goodput == result.request_rate
    assert run(LoadJob(url=url, rate=200.0, goodput=Goodput(ttft=1e-9), **SHAPE)).goodput == 0


def test_url_with_and_without_the_api_path(url: str) -> None:
    for each in (url, f"{url}/", f"{url}/v1", f"{url}/v1/"):
        assert Client(each).models() == ["fake"]


def test_the_same_seed_asks_the_same(url: str, model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    start = model.start_completion

    def record(prompt: Any, params: Any, about: Any) -> Any:
        asked.append(prompt)
        return start(prompt, params, about)

    monkeypatch.setattr(model, "start_completion", record)
    for seed in (1, 1, 2):
        run(LoadJob(url=url, seed=seed, **SHAPE))
    third = len(asked) // 3
    assert asked[:third] == asked[third : 2 * third] != asked[2 * third :]
    assert len(set(asked[:third])) == third  # no prompt comes twice: nothing is cached


def test_an_api_key(model: FakeModel) -> None:
    with running(create_app(model, api_key="secret")) as url:
        assert run(LoadJob(url=url, api_key="secret", **SHAPE)).requests == 6
        with pytest.raises(ConfigError, match=r"HTTP 401: .*; give its --api-key"):
            run(LoadJob(url=url, **SHAPE))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://[::1", "http://x:port"])
def test_not_a_url(url: str) -> None:
    with pytest.raises(ConfigError, match="--url must be like http://127"):
        run(LoadJob(url=url))


def test_nobody_there() -> None:
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:1: the connection .* failed .*; is the server running\?"):
        run(LoadJob(url="http://127.0.0.1:1"))


def test_refusals_of_our_server(url: str) -> None:
    with pytest.raises(ConfigError, match="has no model 'other'; it has: fake"):
        run(LoadJob(url=url, model="other"))
    with pytest.raises(ConfigError, match=r"HTTP 400: the prompt has \d+ tokens"):
        run(LoadJob(url=url, prompt_tokens=1000))
    with pytest.raises(ConfigError, match=r"--prompt-tokens 1 cannot be met here: 1 words, .* make \d+ tokens"):
        run(LoadJob(url=url, prompt_tokens=1))
    with pytest.raises(ConfigError, match="HTTP 404"):
        run(LoadJob(url=f"{url}/elsewhere"))


# --- a server that answers to order -----------------------------------------------------------------------------------

Respond = Callable[[str, dict[str, Any], int], tuple[int, list[Any]]]
"""(path, body, number of the request) → status and events, or one body."""


@contextmanager
def stub(respond: Respond) -> Iterator[str]:
    numbers = iter(range(1000))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any]) -> None:
            with lock:
                number = -1 if self.path == "/v1/models" else next(numbers)
            status, events = respond(self.path, body, number)
            self.send_response(status)
            self.end_headers()
            for event in events:
                if body.get("stream") and status == 200:
                    text = event if isinstance(event, str) else json.dumps(event)
                    self.wfile.write(f": comment\ndata: {text}\n\n".encode())
                else:
                    self.wfile.write((event if isinstance(event, str) else json.dumps(event)).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}], "usage": None}


def whole(body: dict[str, Any]) -> list[Any]:
    """A stream as it should be."""
    words = len(body["prompt"].split())
    usage = {"prompt_tokens": words + 2, "completion_tokens": body["max_tokens"]}
    return [*(piece("x") for _ in range(body["max_tokens"])), {"choices": [], "usage": usage}, "[DONE]"]


def models(*names: str) -> tuple[int, list[Any]]:
    return 200, [{"object": "list", "data": [{"id": name} for name in names]}]


def answering(events: Callable[[dict[str, Any], int], tuple[int, list[Any]]]) -> Respond:
    return lambda path, body, number: models("m") if path == "/v1/models" else events(body, number)


def test_failures_are_counted_by_kind() -> None:
    """The first three requests find out and warm up."""

    def respond(body: dict[str, Any], number: int) -> tuple[int, list[Any]]:
        if number in (3, 5):
            return 503, [{"error": {"message": "busy"}}]
        if number == 4:
            return 200, [piece("x"), {"error": {"message": "broken"}}]
        return 200, whole(body)

    with stub(answering(respond)) as url:
        result = run(LoadJob(url=url, **SHAPE))
    assert result.errors == {"503": 2, "stream": 1}
    assert (result.requests, result.prompt_tokens, result.new_tokens) == (3, 100, 8)


def test_when_every_request_fails() -> None:
    def respond(body: dict[str, Any], number: int) -> tuple[int, list[Any]]:
        return (200, whole(body)) if number < 3 else (503, [{"error": {"message": "busy"}}])

    with (
        stub(answering(respond)) as url,
        pytest.raises(EdgeError, match="answered none of 6 requests; the first failure: HTTP 503: busy"),
    ):
        run(LoadJob(url=url, **SHAPE))


def test_ignore_eos_is_left_out_where_it_is_not_known() -> None:
    seen: list[bool] = []

    def respond(body: dict[str, Any], number: int) -> tuple[int, list[Any]]:
        seen.append("ignore_eos" in body)
        return (400, [{"error": {"message": "unknown field"}}]) if "ignore_eos" in body else (200, whole(body))

    with stub(answering(respond)) as url:
        assert run(LoadJob(url=url, **SHAPE)).requests == 6
    assert seen == [True] + [False] * 9


def test_which_model() -> None:
    def respond(path: str, body: dict[str, Any], number: int) -> tuple[int, list[Any]]:
        return models("a", "b") if path == "/v1/models" else (200, whole(body))

    with stub(respond) as url:
        with pytest.raises(ConfigError, match="name it with --model; it has: a, b"):
            run(LoadJob(url=url))
        assert run(LoadJob(url=url, model="b", **SHAPE)).model == "b"


@pytest.mark.parametrize("answer", ["<html>hello</html>", "[]", '{"data": [{}]}', '{"models": []}'])
def test_not_an_openai_server(answer: str) -> None:
    with (
        stub(lambda path, body, number: (200, [answer])) as url,
        pytest.raises(ConfigError, match="is not an OpenAI-compatible server: /v1/models gives no list"),
    ):
        run(LoadJob(url=url))


def test_chat_only() -> None:
    with (
        stub(answering(lambda body, number: (404, ["no such path"]))) as url,
        pytest.raises(ConfigError, match="HTTP 404: no such path; try --chat"),
    ):
        run(LoadJob(url=url))


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([piece("x"), "[DONE]"], "without usage"),
        ([{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}, "[DONE]"], "no text"),
        ([piece("x")], r"ended without \[DONE\]"),
        ([piece("x"), "{"], "not JSON"),
        ([piece("x"), {"error": {"message": "out of memory"}}], "broke off: out of memory"),
    ],
)
def test_streams_that_are_not_whole(events: list[Any], message: str) -> None:
    with (
        stub(answering(lambda body, number: (200, events))) as url,
        pytest.raises(RequestFailed, match=message) as info,
    ):
        Client(url).ask("completions", {"max_tokens": 2}, "hello")
    assert info.value.kind == "stream"


@pytest.mark.parametrize(("pieces", "tokens"), [(3, 3), (3, 5), (3, 2)])
def test_tokens_are_as_the_server_counts_them(pieces: int, tokens: int) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}}
    events = [piece(""), *(piece("x") for _ in range(pieces)), usage, "[DONE]"]
    with stub(answering(lambda body, number: (200, events))) as url:
        reply = Client(url).ask("completions", {"max_tokens": 9}, "hello")
    assert len(reply.times.arrivals) == pieces  # the empty one is no first token
    assert reply.times.tokens == reply.completion_tokens == tokens


def test_a_request_that_was_due_before_counts_from_then() -> None:
    with stub(answering(lambda body, number: (200, whole(body)))) as url:
        reply = Client(url).ask("completions", {"max_tokens": 2}, "hello", submitted=-5.0)
    assert reply.times.submitted == -5.0


def test_most_at_once() -> None:
    assert _most_at_once([(0, 1)]) == 1
    assert _most_at_once([(0, 1), (1, 2), (2, 3)]) == 1
    assert _most_at_once([(0, 9), (1, 4), (2, 3), (5, 8), (6, 7)]) == 3
