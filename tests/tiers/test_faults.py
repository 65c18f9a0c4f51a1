"""Twelve faults of a server elsewhere, over real sockets: whoever asked gets one whole answer, or an error."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from edge_runtime.errors import TierError, TierFailed
from tests.server.served import wait_until
from tests.tiers.house import GREEDY, LOCAL, QUESTION, Answered, cloud, house, task
from tests.tiers.upstream import (
    DONE,
    USAGE,
    Script,
    answers,
    delta,
    event,
    resets,
    says,
    stalls,
    status,
    stream,
    upstream,
)

QUICK = {"connect": 0.3, "first_token": 1.0, "read": 0.5, "total": 8.0}


@contextmanager
def refused() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


@contextmanager
def unknown_name() -> Iterator[str]:
    yield "http://no-such-host.invalid/v1"


@contextmanager
def untrusted() -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    with upstream(answers("secret"), context=context) as server:
        yield server.url
        assert not server.asked


@contextmanager
def deaf() -> Iterator[str]:
    """A listener whose queue is full: nobody gets through."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        with ExitStack() as callers:
            for _ in range(4):
                caller = callers.enter_context(socket.socket())
                caller.setblocking(False)
                caller.connect_ex(address)
            time.sleep(0.1)
            yield f"http://127.0.0.1:{address[1]}/v1"


def served(script: Callable[[], object]) -> Callable[[], AbstractContextManager[str]]:
    @contextmanager
    def place() -> Iterator[str]:
        with upstream(script()) as server:  # type: ignore[arg-type]
            yield server.url

    return place


BEFORE = {
    "refused": (refused, "cannot be reached"),
    "DNS failure": (unknown_name, "cannot be reached"),
    "TLS failure": (untrusted, "certificate"),
    "connect timeout": (deaf, "could not be reached within"),
    "slow first byte": (served(lambda: stalls()), "did not answer within"),
    "429 with Retry-After": (served(lambda: status(429, retry_after="60")), "429"),
    "500": (served(lambda: status(500)), "500"),
    "malformed JSON": (served(lambda: says(stream(b"data: {nope\n\n"))), "not JSON"),
    "another encoding": (
        served(lambda: says(stream(delta("x")).replace(b"event-stream", b"event-stream; charset=utf-16"))),
        "sent nonsense",
    ),
    "calls that are none": (served(lambda: says(stream(delta(tool_calls=[92])))), "not as OpenAI's"),
    "arguments that are none": (
        served(lambda: says(stream(delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": {}}}])))),
        "not as OpenAI's",
    ),
    "no reason to end": (
        served(lambda: says(stream(event({"choices": [{"delta": {}, "finish_reason": ["stop"]}]})))),
        "unknown reason",
    ),
    "JSON without end": (served(lambda: says(stream(b"data: " + b"[" * 100_000 + b"\n\n"))), "not JSON"),
    "an error without end": (served(lambda: says(b"HTTP/1.1 400 X\r\nconnection: close\r\n\r\n" + b"[" * 3000)), "400"),
    "malformed SSE": (served(lambda: says(stream(b"hello\n\nworld\n\n"))), "ended before"),
    "early close": (served(lambda: says(stream())), "ended before"),
}
"""Faults before anything of the answer has come."""
BEGUN = stream(delta("so far "), delta("so good"))
AMID = {
    "stall": (lambda: stalls(BEGUN), "stalled"),
    "reset": (lambda: resets(BEGUN), "broke off"),
    "malformed JSON": (lambda: says(BEGUN + b"data: {nope\n\n"), "not JSON"),
    "malformed SSE": (lambda: says(BEGUN + b"hello\n\nworld\n\n"), "ended before"),
    "early close": (lambda: says(BEGUN), "ended before"),
    "error event": (lambda: says(BEGUN + b'data: {"error": {"message": "out of memory"}}\n\n'), "out of memory"),
    "an answer nobody asked for": (lambda: says(BEGUN + delta("x", index=3)), "not asked for"),
    "text after the end": (lambda: says(BEGUN + delta(finish="stop") + delta("more") + DONE), "is over"),
}
"""Faults in mid-answer."""


@pytest.mark.parametrize("fault", BEFORE)
def test_before_the_first_word_the_local_model_answers(fault: str, tmp_path: Path) -> None:
    place, why = BEFORE[fault]
    with place() as url, house(tmp_path, cloud(url, timeouts=QUICK) + LOCAL + task(prefer="remote")) as here:
        started = time.monotonic()
        answer = here.ask()
        assert time.monotonic() - started < 5
        assert answer.text == here.local.text()
        assert answer.tiers == ["local"]
        assert answer.route.tier == "local"
        assert why in (answer.route.degraded or "")
        assert why in answer.route.headers()["x-edge-glm-route"]
        here.dispatcher.close()
        sent = [row for row in here.ledger if row["event"] == "sent"]
        assert len(sent) == 1
        (settled,) = [row for row in here.ledger if row["event"] == "settled"]
        assert why in settled["outcome"]


@pytest.mark.parametrize("fault", BEFORE)
def test_alone_it_is_an_error(fault: str, tmp_path: Path) -> None:
    place, why = BEFORE[fault]
    with (
        place() as url,
        house(tmp_path, cloud(url, timeouts=QUICK) + LOCAL + task(tiers=["cloud"])) as here,
        pytest.raises(TierError, match=why) as raised,
    ):
        here.ask()
    assert raised.value.tier == "cloud"


@pytest.mark.parametrize("fault", AMID)
def test_in_mid_answer_it_is_an_error_after_what_has_come(fault: str, tmp_path: Path) -> None:
    script, why = AMID[fault]
    with (
        upstream(script()) as server,
        house(tmp_path, cloud(server.url, timeouts=QUICK) + LOCAL + task(prefer="remote")) as here,
        here.start() as generation,
    ):
        chunks = list(generation)
        assert "".join(chunk.text for chunk in chunks) == "so far so good"
        assert isinstance(chunks[-1].error, TierFailed)
        assert why in str(chunks[-1].error)
        assert [chunk.finish_reason for chunk in chunks][-1] == "error"
        assert {chunk.tier for chunk in chunks} == {"cloud"}
        assert len(server.asked) == 1  # never a second time once something was passed on
        assert not here.local.started


@pytest.mark.parametrize("fault", AMID)
def test_the_local_model_goes_on_where_the_policy_says_so(fault: str, tmp_path: Path) -> None:
    script, why = AMID[fault]
    policy = LOCAL + task(prefer="remote", broken_stream="continue")
    with (
        upstream(script()) as server,
        house(tmp_path, cloud(server.url, timeouts=QUICK) + policy) as here,
    ):
        begun = "so far so good"
        answer = here.ask(params=replace(GREEDY, max_tokens=12 + len(begun)))  # a token is a byte here
        fake = here.local.fake
        ids = fake.tokenizer.encode(fake.template.render(QUESTION), parse_special=True)
        with fake.start_completion([*ids, *fake.tokenizer.encode(begun)], GREEDY) as generation:
            rest = "".join(chunk.text for chunk in generation)
        assert answer.text == begun + rest
        assert answer.tiers == ["cloud", "local"]
        assert why in (answer.route.continued or "")


def test_what_fails_for_a_moment_is_tried_again(tmp_path: Path) -> None:
    retry = {"attempts": 3, "base": 0.01}
    scripts = status(500), says(stream()), answers("there", " it is")
    with (
        upstream(*scripts) as server,
        house(tmp_path, cloud(server.url, timeouts=QUICK, retry=retry) + LOCAL + task(prefer="remote")) as here,
    ):
        answer = here.ask()
        assert answer.text == "there it is"
        assert answer.route.degraded is None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 3)
        assert len({asked.headers["idempotency-key"] for asked in server.asked}) == 1
        assert len({asked.raw.partition(b"\r\n\r\n")[2] for asked in server.asked}) == 1
        here.dispatcher.close()
        assert [(row["event"], row["attempt"]) for row in here.ledger if row["event"] == "sent"] == [
            ("sent", 1),
            ("sent", 2),
            ("sent", 3),
        ]


@pytest.mark.parametrize("wish", ["1e999", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_nobody_is_left_alone_for_ever(wish: str, tmp_path: Path) -> None:
    with upstream(status(429, retry_after=wish)) as server, house(tmp_path, cloud(server.url) + task()) as home:
        with pytest.raises(TierError):
            home.ask()
        with pytest.raises(TierError, match=r"left alone for 3[56]\d\d\.\d s more"):
            home.ask()


def test_retry_after_is_kept(tmp_path: Path) -> None:
    retry = {"attempts": 2, "base": 0.01}
    with (
        upstream(status(429, retry_after="1"), answers("now")) as server,
        house(tmp_path, cloud(server.url, retry=retry) + LOCAL + task(prefer="remote")) as here,
    ):
        started = time.monotonic()
        assert here.ask().text == here.local.text()  # the tier is left alone as long as it asks for
        assert len(server.asked) == 1
        wait_until(lambda: here.ask().text == "now")
        assert time.monotonic() - started >= 1
        assert len(server.asked) == 2


@pytest.mark.parametrize("code", [400, 404, 413, 422])
def test_a_request_at_fault_is_not_sent_again(code: int, tmp_path: Path) -> None:
    retry = {"attempts": 3, "base": 0.01}
    with (
        upstream(status(code)) as server,
        house(tmp_path, cloud(server.url, retry=retry) + LOCAL + task(prefer="remote")) as here,
    ):
        for _ in range(8):
            assert here.ask().tiers == ["local"]
        assert len(server.asked) == 8  # and the tier is not thought to be broken


@pytest.mark.parametrize("code", [401, 403, 301])
def test_a_closed_door_is_not_knocked_at_twice(code: int, tmp_path: Path) -> None:
    retry = {"attempts": 3, "base": 0.01}
    with (
        upstream(status(code)) as server,
        house(tmp_path, cloud(server.url, retry=retry) + LOCAL + task(prefer="remote")) as here,
    ):
        assert str(code) in (here.ask().route.degraded or "")
        assert len(server.asked) == 1


def test_whoever_leaves_ends_the_request_there(tmp_path: Path) -> None:
    with (
        upstream(stalls(BEGUN)) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        with here.start() as generation:
            assert next(generation).text == "so far "
        assert server.left.acquire(timeout=5)
        here.dispatcher.close()
        assert [row["outcome"] for row in here.ledger if row["event"] == "settled"] == ["cancelled"]


def test_an_answer_that_is_forgotten_ends_too(tmp_path: Path) -> None:
    with (
        upstream(stalls()) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        generation = here.start()
        wait_until(lambda: server.asked)
        del generation
        assert server.left.acquire(timeout=5)


def test_many_at_once_each_get_their_own(tmp_path: Path) -> None:
    def echo(client: object) -> None:
        question = client.asked.body["messages"][0]["content"]  # type: ignore[attr-defined]
        answers(*f"{question}!")(client)  # type: ignore[arg-type]

    answered: dict[int, Answered] = {}
    with (
        upstream(echo) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):

        def ask(number: int) -> None:
            answered[number] = here.ask([{"role": "user", "content": f"number {number}"}])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {number: each.text for number, each in answered.items()} == {n: f"number {n}!" for n in range(24)}
    assert all(each.tiers == ["cloud"] for each in answered.values())


@pytest.mark.parametrize("end", [stalls, resets, says])
def test_a_whole_answer_needs_no_done(end: Callable[[bytes], Script], tmp_path: Path) -> None:
    whole = stream(delta("so far "), delta("so good"), delta(finish="stop"))
    with (
        upstream(end(whole)) as server,
        house(tmp_path, cloud(server.url, timeouts=QUICK) + LOCAL + task(prefer="remote")) as here,
    ):
        answer = here.ask()
        assert answer.text == "so far so good"
        assert answer.chunks[-1].finish_reason == "stop"
        here.dispatcher.close()
        assert [row["outcome"] for row in here.ledger if row["event"] == "settled"] == ["answered"]


def test_usage_comes_from_the_server(tmp_path: Path) -> None:
    with (
        upstream(says(stream(delta("hi"), delta(finish="length"), USAGE, DONE))) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        answer = here.ask()
        assert answer.chunks[-1].usage == answer.usage
        assert answer.usage.completion_tokens == 3
        assert answer.chunks[-1].finish_reason == "length"


def test_where_the_server_does_not_count_pieces_are_counted(tmp_path: Path) -> None:
    with (
        upstream(says(stream(delta("one "), delta("two "), delta("three"), delta(finish="stop"), DONE))) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        answer = here.ask()
        assert answer.usage.completion_tokens == 3
        assert answer.usage.prompt_tokens > 10  # by the tokenizer here
        assert answer.chunks[-1].usage == answer.usage
