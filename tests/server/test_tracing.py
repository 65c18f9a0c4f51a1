"""Where a request's time went, as the server tells it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from edge_runtime.cli.main import main
from edge_runtime.server.app import create_app
from edge_runtime.tracing.recorder import Recorder
from edge_runtime.tracing.trace import PARTS, Trace
from tests.server.served import CHAT, TEXT, FakeModel, error_of, running, wait_until
from tests.server.test_leaving import sent
from tests.server.test_tiers import AWAY
from tests.server.test_tiers import CHAT as TIERED
from tests.tiers.house import LOCAL, TieredModel, cloud, house, task
from tests.tiers.upstream import Connection, Script, answers, stalls, status, upstream

STEP_S = 0.004
"""Of a model slow enough that nanoseconds between two marks do not count."""


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def url(recorder: Recorder) -> Iterator[str]:
    model = FakeModel(before_forward=lambda batch: time.sleep(STEP_S))
    with running(create_app(model, recorder=recorder)) as url:
        yield url
    model.engine.close()


def newest(recorder: Recorder, before: int) -> Trace:
    """The trace of the request that was sent after there were ``before``; it ends a moment after its answer."""
    wait_until(lambda: len(recorder.ring.newest(1000)) > before)
    return recorder.ring.newest(1)[0]


def traced(
    url: str, recorder: Recorder, path: str, body: dict[str, Any], **headers: str
) -> tuple[httpx.Response, Trace]:
    before = len(recorder.ring.newest(1000))
    response = httpx.post(
        f"{url}{path}", json=body, headers={key.replace("_", "-"): value for key, value in headers.items()}
    )
    return response, newest(recorder, before)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/v1/chat/completions", CHAT | {"stream": True, "n": 3}),
        ("/v1/completions", TEXT | {"prompt": ["Hi", "there", "x" * 100]}),
        ("/v1/responses", {"model": "fake", "input": "Hi", "max_output_tokens": 5}),
        ("/api/chat", {"model": "fake", "messages": CHAT["messages"], "options": {"num_predict": 5}}),
    ],
)
def test_spans_cover_the_request(url: str, recorder: Recorder, path: str, body: dict[str, Any]) -> None:
    response, trace = traced(url, recorder, path, body)
    assert response.status_code == 200
    assert trace.covered >= 0.99
    parts = trace.parts()
    wanted = {"receive", "tokenize", "queue", "prefix lookup", "prefill", "decode", "sample", "detokenize", "send"}
    assert wanted <= set(parts)
    assert parts["prefill"] + parts["decode"] >= 3 * STEP_S * 1e9  # three tokens at least
    assert trace.about["path"] == path
    assert (trace.about["model"], trace.about["tier"], trace.about["status"]) == ("fake", "local", 200)
    assert int(trace.about["prompt_tokens"]) > 0


def test_a_prompt_in_chunks_has_a_span_for_each(url: str, recorder: Recorder) -> None:
    """And none of them overlap: they are one thread's."""
    _, trace = traced(url, recorder, "/v1/completions", TEXT | {"prompt": "chunks " * 9})
    spans = [each for each in trace if each.lane == "engine"]
    assert sum(each.part == "prefill" for each in spans) == 4  # 16 at a time
    assert all(before.end == after.start for before, after in pairwise(spans))


def test_who_asks_is_told(url: str, recorder: Recorder) -> None:
    response, _ = traced(url, recorder, "/v1/chat/completions", CHAT, x_edge_glm_timing="1")
    header = response.headers["server-timing"]
    told = {name: float(rest.removeprefix("dur=")) for name, rest in (each.split(";") for each in header.split(", "))}
    assert told["prefill"] >= STEP_S * 1e3
    assert told["total"] >= told["prefill"] + told["decode"]
    assert set(told) <= {part.replace(" ", "-") for part in PARTS} | {"total"}


def test_a_stream_ends_with_its_times(url: str, recorder: Recorder) -> None:
    body = CHAT | {"stream": True}
    response, _ = traced(url, recorder, "/v1/chat/completions", body, x_edge_glm_timing="yes")
    lines = [line for line in response.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    told = json.loads(lines[-2].removeprefix(": timing "))
    assert told["decode"] >= 2 * STEP_S * 1e3
    assert "server-timing" in response.headers


@pytest.mark.parametrize("value", ["", "0", "false", "NO"])
def test_who_does_not_ask_is_not(value: str, url: str, recorder: Recorder) -> None:
    response, _ = traced(url, recorder, "/v1/chat/completions", CHAT | {"stream": True}, x_edge_glm_timing=value)
    assert "server-timing" not in response.headers
    assert "timing" not in response.text


def test_the_callers_trace_goes_on(url: str, recorder: Recorder) -> None:
    _, trace = traced(url, recorder, "/v1/chat/completions", CHAT, traceparent=f"00-{'a' * 32}-{'b' * 16}-01")
    assert (trace.id, trace.parent) == ("a" * 32, "b" * 16)


def test_traces(url: str, recorder: Recorder) -> None:
    traced(url, recorder, "/v1/chat/completions", CHAT)
    told = httpx.get(f"{url}/traces", params={"limit": 1}).json()["data"]
    assert [each["id"] for each in told] == [recorder.ring.newest(1)[0].id]
    assert told[0]["covered"] >= 0.99
    assert told[0]["ms"]["total"] >= 3 * STEP_S * 1e3
    chrome = httpx.get(f"{url}/traces?format=chrome").json()
    assert {event["ph"] for event in chrome["traceEvents"]} == {"M", "X"}


def test_telling_stops_nobody(url: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done off the event loop, and does not look at all spans each time."""
    threads = {threading.current_thread().name}

    def tell(kept: list[Trace]) -> dict[str, Any]:
        threads.add(threading.current_thread().name)
        return {}

    monkeypatch.setattr("edge_runtime.server.tracing.chrome_trace", tell)
    assert httpx.get(f"{url}/traces?format=chrome").json() == {}
    assert any("AnyIO worker" in each for each in threads)
    _, trace = traced(url, recorder, "/v1/chat/completions", CHAT)
    before = httpx.get(f"{url}/traces?limit=1").json()
    monkeypatch.setattr(trace, "_spans", None)
    monkeypatch.setattr(Trace, "__len__", lambda trace: trace._covered[0])
    assert httpx.get(f"{url}/traces?limit=1").json() == before


@pytest.mark.parametrize("query", ["limit=x", "limit=-1", "limit=²", "format=xml"])
def test_what_traces_cannot_be_asked(query: str, url: str) -> None:
    response = httpx.get(f"{url}/traces?{query}")
    assert response.status_code == 400
    assert query.split("=")[0] in error_of(response)["message"]


def test_no_trace_says_what_was_asked_or_answered(url: str, recorder: Recorder) -> None:
    secret = "quincunx"
    body = CHAT | {"messages": [{"role": "user", "content": secret}], "user": secret, "stop": [secret]}
    _, trace = traced(url, recorder, "/v1/chat/completions", body, authorization=f"Bearer {secret}")
    assert secret not in str(trace.about)
    assert secret not in httpx.get(f"{url}/traces?format=chrome").text
    missing, trace = traced(url, recorder, f"/v1/{secret}", {})
    assert missing.status_code == 404
    assert trace.about["path"] == "other"


def test_refusals_are_traced_too(url: str, recorder: Recorder) -> None:
    response, trace = traced(url, recorder, "/v1/chat/completions", CHAT | {"max_tokens": -1})
    assert response.status_code == trace.about["status"] == 400


def told_of(trace: Trace) -> dict[str, float]:
    """Shares of the wall time, ``other`` among them. Their spans reach from one end to the other."""
    wait_until(lambda: trace.covered >= 0.99)  # threads that come late tell of what they did until the end
    shares = {part: took / trace.wall for part, took in trace.parts().items()}
    assert shares.get("other", 0) < 0.2, shares
    assert sum(shares.values()) >= 0.99
    return shares


WAIT_S = 0.4


def late(script: Script) -> Script:
    def waits(client: Connection) -> None:
        time.sleep(WAIT_S)
        script(client)

    return waits


def test_waiting_for_several_prompts_is_not_said_twice() -> None:
    recorder, model = Recorder(), FakeModel(before_forward=lambda batch: time.sleep(0.03))
    with running(create_app(model, recorder=recorder)) as url:
        for stream in (True, False):
            body = TEXT | {"prompt": ["Hi", "there", "x"], "max_tokens": 9, "ignore_eos": True, "stream": stream}
            _, trace = traced(url, recorder, "/v1/completions", body)
            assert told_of(trace)["decode"] > 0.5
    model.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("first", "policy", "longest"),
    [
        (status(503), task(prefer="remote"), "upstream cloud"),  # and then here
        (answers("from ", "afar"), task(prefer="remote", hedge_ms=50), "upstream cloud"),
        (status(422), task(prefer="remote", tiers=["cloud"]), "upstream cloud"),
    ],
    ids=["refused", "raced", "failed"],
)
def test_waiting_for_a_tier_is_not_said_twice(
    first: Script, policy: str, longest: str, stream: bool, tmp_path: Path
) -> None:
    recorder = Recorder()
    with (
        upstream(late(first)) as server,
        house(tmp_path, cloud(server.url) + LOCAL + policy) as here,
        running(create_app(TieredModel(here), recorder=recorder)) as url,
    ):
        if "hedge" in policy:
            here.local.gate.clear()  # it loses
        _, trace = traced(url, recorder, "/v1/chat/completions", TIERED | {"stream": stream})
        assert told_of(trace)[longest] > 0.7


def test_waiting_until_the_client_left_is_not_said_twice(tmp_path: Path) -> None:
    recorder, gate = Recorder(), threading.Event()
    model = FakeModel(before_forward=lambda batch: bool(gate.wait(30)) and None)
    with running(create_app(model, recorder=recorder)) as url:
        with sent(url, "/v1/chat/completions", CHAT):
            wait_until(lambda: model.engine.stats.running)
            with sent(url, "/v1/chat/completions", CHAT):
                wait_until(lambda: model.engine.stats.waiting)
                time.sleep(WAIT_S)
            trace = newest(recorder, 0)
        gate.set()
        assert told_of(trace)["queue"] > 0.8
    model.close()
    with (
        upstream(stalls()) as server,
        house(tmp_path, cloud(server.url) + AWAY) as here,
        running(create_app(TieredModel(here), recorder=recorder)) as url,
    ):
        before = len(recorder.ring.newest(1000))
        with sent(url, "/v1/chat/completions", TIERED | {"stream": True}):
            time.sleep(WAIT_S)
        assert told_of(newest(recorder, before))["upstream cloud"] > 0.8


def test_what_got_no_answer_has_a_status_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A client that leaves while its tier is awaited, and a bug, whose 500 is sent outside: both are listed."""
    recorder = Recorder()
    with (
        upstream(stalls()) as server,
        house(tmp_path, cloud(server.url) + AWAY) as here,
        running(create_app(TieredModel(here), recorder=recorder)) as url,
    ):
        with sent(url, "/v1/chat/completions", TIERED | {"stream": True}):
            wait_until(lambda: server.asked)
        assert newest(recorder, 0).about["status"] == 499
    model = FakeModel()
    model.start_chat = broken  # type: ignore[method-assign]
    with running(create_app(model, recorder=recorder)) as url:
        response, trace = traced(url, recorder, "/v1/chat/completions", CHAT)
        assert response.status_code == trace.about["status"] == 500
        assert main(["ps", "--requests", "--url", url]) == 0
        _, *rows = capsys.readouterr().out.splitlines()
        assert [row.split()[2] for row in rows] == ["500", "499"]
        counted = httpx.get(f"{url}/metrics").text.splitlines()
        assert any('status="500"' in line and line.endswith(" 1.0") for line in counted)
    model.close()


def test_a_client_that_leaves_in_the_middle_of_its_body_has_left(url: str, recorder: Recorder) -> None:
    """It did nothing wrong, and is told nothing."""
    before, parts = len(recorder.ring.newest(1000)), urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        wait_until(lambda: "in_flight 2.0" in httpx.get(f"{url}/metrics").text)
    assert newest(recorder, before).about["status"] == 499


def broken(*given: Any) -> Any:
    raise RuntimeError("a bug")


def test_who_is_not_let_in_drives_nobody_out() -> None:
    recorder, model = Recorder(), FakeModel()
    path = "/v1/chat/completions"
    with running(create_app(model, recorder=recorder, api_key="secret", per_minute=1)) as url:
        _, trace = traced(url, recorder, path, CHAT, authorization="Bearer secret")
        wrong, right = {"authorization": "Bearer wrong"}, {"authorization": "Bearer secret"}
        for headers, code in (({}, 401), (wrong, 401), (right, 429)):
            assert httpx.post(f"{url}{path}", json=CHAT, headers=headers).status_code == code
        time.sleep(0.1)
        assert recorder.ring.newest(9) == [trace]
    with running(create_app(model, recorder=recorder)) as url:
        assert httpx.post(f"{url}{path}", json=CHAT, headers={"origin": "http://page.example"}).status_code == 403
        time.sleep(0.1)
        assert recorder.ring.newest(9) == [trace]
    model.close()


def test_watching_is_not(url: str, recorder: Recorder) -> None:
    before = len(recorder.ring.newest(1000))
    for path in ("/health", "/metrics", "/traces", "/v1/models"):
        assert httpx.get(f"{url}{path}").status_code == 200
    assert len(recorder.ring.newest(1000)) == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_tier_elsewhere(stream: bool, tmp_path: Path) -> None:
    recorder = Recorder()
    with (
        upstream(answers("from ", "afar")) as server,
        house(tmp_path, cloud(server.url) + AWAY) as here,
        running(create_app(TieredModel(here), recorder=recorder)) as url,
    ):
        _, trace = traced(url, recorder, "/v1/chat/completions", TIERED | {"stream": stream})
        assert trace.about["tier"] == "cloud"
        assert {"route", "upstream cloud"} <= set(trace.parts())
        assert any(each.lane == "tier cloud" for each in trace)


def test_a_judged_answer_here(tmp_path: Path) -> None:
    recorder = Recorder()
    with (
        upstream(answers("from ", "afar")) as server,
        house(tmp_path, LOCAL + cloud(server.url) + task(prefer="local")) as here,
        running(create_app(TieredModel(here), recorder=recorder)) as url,
    ):
        _, trace = traced(url, recorder, "/v1/chat/completions", TIERED | {"stream": True})
        assert {"route", "template", "tokenize", "prefill", "decode"} <= set(trace.parts())
        assert trace.about["tier"] in ("local", "cloud")
