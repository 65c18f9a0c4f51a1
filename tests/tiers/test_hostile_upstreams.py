"""Servers elsewhere that mean harm: they get no key that is not theirs, fill no memory, and leave no trace of a key."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pytest

from edge_runtime.errors import TierError, TierFailed
from edge_runtime.tiers import remote
from tests.tiers.house import LOCAL, cloud, house, task
from tests.tiers.upstream import (
    DONE,
    HEADERS,
    Connection,
    Script,
    answers,
    delta,
    event,
    says,
    status,
    stream,
    upstream,
)

KEY = "sk-very-secret-key-0123456789"
QUICK = {"connect": 0.5, "first_token": 5.0, "read": 5.0, "total": 20.0}


def endless(start: bytes, piece: bytes, most: int = 1 << 30) -> Script:
    """Much more than anybody should read, as fast as it is read."""

    def script(client: Connection) -> None:
        try:
            client.socket.sendall(start)
            for _ in range(most // len(piece)):
                client.socket.sendall(piece)
        except OSError:
            client.gone.wait(0)  # the client has left, as it should
        else:
            raise AssertionError("all of it was read")

    return script


def failure(path: Path, url: str, monkeypatch: pytest.MonkeyPatch, **more: object) -> str:
    """What a request to the only tier fails with."""
    path.mkdir(exist_ok=True)
    monkeypatch.setenv("SOME_KEY", KEY)
    options = {"api_key_env": "SOME_KEY", "timeouts": QUICK, "retry": {"attempts": 1}, **more}
    with house(path, cloud(url, **options) + LOCAL + task(tiers=["cloud"])) as here:
        with pytest.raises(TierError) as raised:
            here.ask()
        here.dispatcher.close()
        told = [str(raised.value), str(here.ledger), str(here.dispatcher.health())]
        assert not any(KEY[:8] in each for each in told), told
    return str(raised.value)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_takes_neither_request_nor_key_elsewhere(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with upstream(answers("stolen")) as thief:
        for place in (f"http://127.0.0.1:{thief.port}/v1/chat/completions", "file:///etc/passwd"):
            with upstream(status(code, location=place)) as server:
                assert f"answers {code}" in failure(tmp_path / str(server.port), server.url, monkeypatch)
                assert len(server.asked) == 1
        assert not thief.asked


@pytest.mark.parametrize("code", [200, 500])
@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "gzip, gzip"])
def test_a_few_compressed_bytes_stay_a_few(
    code: int, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = gzip.compress(bytes(64 * 2**20))
    head = f"HTTP/1.1 {code} X\r\ncontent-type: text/event-stream\r\ncontent-encoding: {encoding}\r\n".encode()
    with upstream(says(head + b"connection: close\r\n\r\n" + bomb)) as server:
        tracemalloc.start()
        try:
            assert "compresses its answers" in failure(tmp_path, server.url, monkeypatch)
            assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
        finally:
            tracemalloc.stop()
        assert server.asked[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (endless(HEADERS + b"data: ", b"x" * 65536), "nonsense"),  # a line without end
        (endless(HEADERS, b"data: x\n" * 8192), "nonsense"),  # an event without end
        (endless(HEADERS, b"data: {}\r" * 8192), "nonsense"),
        (endless(b"HTTP/1.1 200 OK\r\n", b"x-more: " + b"y" * 65000 + b"\r\n"), "broke off"),  # headers without end
        (endless(b"HTTP/1.1 ", b"2" * 65536), "broke off"),
        (endless(b"HTTP/1.1 500 X\r\n\r\n", b"z" * 65536), "answers 500"),  # an error without end
    ],
    ids=range(6),
)
def test_what_has_no_end_is_not_kept(
    script: Script, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with upstream(script) as server:
        tracemalloc.start()
        try:
            assert said in failure(tmp_path, server.url, monkeypatch)
            assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
        finally:
            tracemalloc.stop()


def test_an_answer_has_a_longest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_ANSWER", 256 * 1024)
    with upstream(endless(stream(), delta("more and more") * 100, 8 << 20)) as server:
        assert "more than 262144 bytes" in failure(tmp_path, server.url, monkeypatch)


@pytest.mark.parametrize(
    "script",
    [
        status(401, {"error": {"message": "x" * 190 + KEY}}),  # where the message is cut
        status(500, {"error": {"message": KEY}}),
        says(b"HTTP/1.1 500 X\r\n\r\nno JSON: " + KEY.encode()),
        says(stream(event({"error": {"message": f"wrong key {KEY}"}}))),
        says(stream(b"data: " + b"x" * 70 + KEY.encode() + b"\n\n")),
        says(stream(event([KEY]))),
        says(stream(event({"choices": [KEY]}))),
        says(stream(event({"choices": [{"index": 0, "delta": KEY}]}))),
        says(stream(event({"choices": [{"index": 0, "delta": {"content": [KEY]}}]}))),
        says(stream(event({"choices": [{"index": 0, "delta": {}, "finish_reason": KEY}]}))),
        says(stream(event({"choices": [{"index": KEY}]}))),
    ],
    ids=range(11),
)
def test_a_key_that_is_repeated_is_not_told(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with upstream(script) as server:
        failure(tmp_path, server.url, monkeypatch)


@pytest.mark.parametrize("value", ["1e308", "inf", "nan", "-5", "Fri, 31 Dec 9999 23:59:59 GMT", "never"])
def test_no_answer_puts_a_tier_aside_for_good(value: str, tmp_path: Path) -> None:
    with (
        upstream(status(429, retry_after=value)) as server,
        house(tmp_path, cloud(server.url, retry={"attempts": 1}) + LOCAL + task(tiers=["cloud"])) as here,
        pytest.raises(TierFailed) as raised,
    ):
        here.ask()
    assert raised.value.retry_after is None or 0 <= raised.value.retry_after <= 86_400


@pytest.mark.parametrize("text", ["a\r\nx-evil: 1", "a\nset-cookie: b", "caf\u00e9 \u2028"])
def test_what_a_server_says_adds_no_header(text: str, tmp_path: Path) -> None:
    """Its words stand in the route's header."""
    with (
        upstream(status(400, {"error": {"message": text}})) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        try:
            headers = here.ask().route.headers()
        except TierError as error:
            headers = {"error": str(error)}
    for name, value in headers.items():
        assert "\r" not in name + value
        assert "\n" not in name + value


def test_an_answer_may_end_as_it_likes(tmp_path: Path) -> None:
    """The bounds above refuse nothing that is usual."""
    with (
        upstream(says(stream(b": a comment\n\n", delta("hi"), delta(finish="stop"), DONE))) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        assert here.ask().text == "hi"
