"""Keys, rates, limits, origins and slow clients."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import stat
import subprocess
import sys
import time
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_runtime.errors import ConfigError, StorageError
from edge_runtime.keys import KeyRing
from edge_runtime.server import context, protocol
from edge_runtime.server.app import create_app
from edge_runtime.server.rate import MOST, RateLimit
from tests.server.served import CHAT, TEXT, FakeModel, error_of, running

ROOT = Path(__file__).parents[2]


def ask(url: str, key: str | None = None, **more: Any) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/completions", json=TEXT | more, headers=headers)


def test_several_keys_of_which_digests_are_kept(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    assert ring.keys == ()
    anna, eva = ring.add("anna"), ring.add("eva", per_minute=2)
    assert anna != eva
    text = (tmp_path / "keys.json").read_text()
    assert anna not in text
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600
    for secret, name in ((anna, "anna"), (eva, "eva")):
        found = ring.find(secret)
        assert found is not None
        assert found.name == name
    assert ring.find(anna[:-1]) is None
    assert ring.find("") is None
    assert ring.find("\udcff") is None
    with pytest.raises(ConfigError, match="already"):
        ring.add("anna")
    with pytest.raises(ConfigError, match="letters"):
        ring.add("two words")
    with pytest.raises(ConfigError, match="at least one"):
        ring.add("otto", per_minute=0)
    with pytest.raises(ConfigError, match="there: anna, eva"):
        ring.remove("otto")


def test_a_running_server_learns_of_new_and_removed_keys(tmp_path: Path) -> None:
    model, ring = FakeModel(), KeyRing(tmp_path / "keys.json")
    with running(create_app(model, api_key="fixed", keys=KeyRing(tmp_path / "keys.json"))) as url:
        assert ask(url).status_code == 401
        assert ask(url, "fixed").status_code == 200
        secret = ring.add("anna")
        assert ask(url, secret).status_code == 200
        ring.remove("anna")
        refused = ask(url, secret)
        assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{url}/metrics").status_code == 401
        for path in ("/health", "/health/live", "/health/ready"):
            assert httpx.get(url + path).status_code == 200
        (tmp_path / "keys.json").write_text("no JSON")
        broken = ask(url, "fixed")
        assert broken.status_code == 500  # nobody comes in by mistake
        assert "API keys" in error_of(broken)["message"]
    with pytest.raises(StorageError, match="cannot read the API keys"):
        _ = ring.keys
    model.engine.close()


def test_rates(tmp_path: Path) -> None:
    model, ring = FakeModel(), KeyRing(tmp_path / "keys.json")
    slow, quick = ring.add("slow", per_minute=2), ring.add("quick")
    with running(create_app(model, keys=ring, per_minute=5)) as url:
        assert [ask(url, slow).status_code for _ in range(3)] == [200, 200, 429]
        assert [ask(url, quick).status_code for _ in range(6)] == [*[200] * 5, 429]
        refused = ask(url, slow)
        assert 0 < int(refused.headers["retry-after"]) <= 30
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {slow}"}).status_code == 200
    model.engine.close()


def test_a_bucket_fills_steadily() -> None:
    now = 100.0
    rate = RateLimit(lambda: now)
    assert [rate.take("a", 3) for _ in range(3)] == [0, 0, 0]
    assert rate.take("a", 3) == pytest.approx(20)
    assert rate.take("b", 3) == 0
    now += 20
    assert rate.take("a", 3) == 0
    assert rate.take("a", 3) == pytest.approx(20)
    now += 1000
    assert [rate.take("a", 3) == 0 for _ in range(4)] == [True, True, True, False]
    for number in range(MOST):
        rate.take(str(number), 1)
    assert rate.take("a", 3) == 0  # forgotten, and so full again


def test_limits_of_bodies_and_answers() -> None:
    model = FakeModel()
    with running(create_app(model, max_body=300, max_new_tokens=4)) as url:
        too_long = ask(url, prompt="x" * 400)
        assert (too_long.status_code, error_of(too_long)["code"]) == (413, "request_too_large")
        asked = ask(url, max_tokens=5)
        assert (asked.status_code, error_of(asked)["param"]) == (400, "max_tokens")
        unsaid = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "max_tokens": None, "ignore_eos": True})
        assert unsaid.json()["usage"]["completion_tokens"] == 4
        by_name = httpx.post(
            f"{url}/v1/chat/completions", json={**CHAT, "max_tokens": None, "max_completion_tokens": 9}
        )
        assert error_of(by_name)["param"] == "max_completion_tokens"
        theirs = httpx.post(f"{url}/api/generate", json={"model": "fake", "prompt": "x", "options": {"num_predict": 9}})
        assert theirs.status_code == 400
    for wrong in ({"max_body": 0}, {"max_new_tokens": 0}, {"per_minute": 0}, {"api_key": "two words"}):
        with pytest.raises(ConfigError):
            create_app(model, **wrong)  # type: ignore[arg-type]
    model.engine.close()


def test_origins() -> None:
    model, page = FakeModel(), {"origin": "https://app.example"}
    with running(create_app(model)) as url:
        refused = httpx.post(f"{url}/v1/completions", json=TEXT, headers=page)
        assert (refused.status_code, error_of(refused)["code"]) == (403, "forbidden")
        assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers=page).headers
        own = httpx.post(f"{url}/v1/completions", json=TEXT, headers={"origin": url})
        assert own.status_code == 200
        rebound = {"origin": "http://evil.example", "host": "evil.example"}
        assert httpx.post(f"{url}/v1/completions", json=TEXT, headers=rebound).status_code == 403
    with running(create_app(model, origins=["https://app.example"])) as url:
        allowed = httpx.post(f"{url}/v1/completions", json=TEXT, headers=page)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        asked = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert httpx.options(f"{url}/v1/completions", headers=asked).status_code == 200
        other = httpx.post(f"{url}/v1/completions", json=TEXT, headers={"origin": "https://other.example"})
        assert other.status_code == 403
    model.engine.close()


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/api/ps", "/health", "/", "/v1/responses/resp_1"])
def test_a_page_whose_name_resolves_here_reads_nothing(path: str) -> None:
    """DNS rebinding: to the browser it is the page's own site, so that no Origin is sent, but its Host is."""
    model = FakeModel()
    with running(create_app(model)) as url:
        port = url.rsplit(":", 1)[1]
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "[x"):
            refused = httpx.get(url + path, headers={"host": host})
            assert (refused.status_code, error_of(refused)["code"]) == (403, "forbidden"), host
        for host in ("localhost", f"LocalHost:{port}", f"127.0.0.1:{port}", "[::1]", f"[::1]:{port}"):
            assert httpx.get(url + path, headers={"host": host}).status_code in (200, 404), host
    model.engine.close()


def test_names_of_other_machines_with_a_key_a_proxy_or_where_all_may_ask() -> None:
    model, name = FakeModel(), {"host": "llm.example"}
    with running(create_app(model, api_key="k")) as url:
        given = {**name, "authorization": "Bearer k"}
        assert httpx.get(f"{url}/v1/models", headers=given).status_code == 200
        assert httpx.get(f"{url}/health", headers=name).status_code == 200
    with running(create_app(model, origins=["https://llm.example"])) as url:
        assert httpx.get(f"{url}/v1/models", headers=name).status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={"host": "other.example"}).status_code == 403
    with running(create_app(model), allow_open=True) as url:
        assert httpx.get(f"{url}/v1/models", headers=name).status_code == 200
    model.engine.close()


def test_slow_clients_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(context, "BODY_SECONDS", 0.3)
    model = FakeModel()
    with running(create_app(model)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
            assert ask(url).status_code == 200  # others are not kept waiting
            assert slow.recv(100) == b""
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            assert b" 408 " in slow.recv(1000).splitlines()[0]
        with closing(HTTPConnection(host, int(port), timeout=20)) as client:  # a connection that has asked may wait
            client.connect()
            client.auto_open = 0  # it is this one that must answer again
            for seconds in (0, 0.5):
                time.sleep(seconds)
                client.request("GET", "/health")
                answer = client.getresponse()
                assert (answer.status, bool(answer.read())) == (200, True)
    model.engine.close()


HEAD = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
STRANGE_HEADS = {
    "too long": HEAD + b"X: " + b"a" * 200_000,
    "too many": HEAD + b"".join(b"X%d: 1\r\n" % number for number in range(20_000)),
    "a name with a space": HEAD + b"Bad Header: 1\r\n\r\n",
    "folded": HEAD + b"X: 1\r\n\x00\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": HEAD + b"Host: y\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a negative length": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}",
    "two lengths": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "an unknown encoding": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
}


def test_strange_heads_are_refused() -> None:
    """With OpenAI's error body, and others do not notice."""
    model = FakeModel()
    with running(create_app(model)) as url:
        host, port = url.removeprefix("http://").split(":")
        for name, head in STRANGE_HEADS.items():
            with socket.create_connection((host, int(port)), timeout=20) as client:
                with suppress(ConnectionError):  # it need not read all of it
                    client.sendall(head)
                answer = b""
                with suppress(ConnectionError):
                    while part := client.recv(4096):
                        answer += part
            status, _, body = answer.partition(b"\r\n\r\n")
            assert status.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")), (name, answer)
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, name
        assert ask(url).status_code == 200
    model.engine.close()


@pytest.mark.parametrize(("method", "version"), [(b"POST", b"1.0"), (b"POST", b"1.1"), (b"HEAD", b"1.1")])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_body_that_is_no_http(method: bytes, version: bytes, at_once: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The client gets one answer, and the log no traceback: HTTP has no second answer."""
    model = FakeModel()
    head = method + b" /nothing HTTP/" + version + b"\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with running(create_app(model)) as url:
        logging.getLogger("uvicorn.error").addHandler(caplog.handler)
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            answer = b""
            client.sendall(head + b"no chunk\r\n" if at_once else head)
            answer += client.recv(65536)
            with suppress(ConnectionError):
                client.sendall(b"no chunk\r\n")
                while part := client.recv(4096):
                    answer += part
        assert answer.startswith(b"HTTP/1.1 4")
        assert len(re.findall(rb"HTTP/1.1 \d", answer)) == 1
        assert answer.count(b'"error"') == (method == b"POST")
        assert ask(url).status_code == 200
        logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    model.engine.close()
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def test_tokens() -> None:
    model = FakeModel()
    with running(create_app(model)) as url:
        answer = httpx.post(f"{url}/tokenize", json={"prompt": "Hi é", "return_token_strs": True}).json()
        assert answer["tokens"] == model.tokenizer.encode("Hi é")
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["max_model_len"] == 512
        back = httpx.post(f"{url}/detokenize", json={"tokens": answer["tokens"]}).json()
        assert back == {"prompt": "Hi é"}
        chat = httpx.post(f"{url}/tokenize", json={"model": "fake", "messages": CHAT["messages"]}).json()
        told = httpx.post(f"{url}/v1/chat/completions", json=CHAT).json()
        assert chat["count"] == told["usage"]["prompt_tokens"]
        for body in ({}, {"prompt": "x", "messages": CHAT["messages"]}, {"prompt": 3}, {"messages": []}):
            assert httpx.post(f"{url}/tokenize", json=body).status_code == 400
        for tokens in ([-1], [2**40], ["a"], None):
            assert httpx.post(f"{url}/detokenize", json={"tokens": tokens}).status_code == 400
        assert httpx.post(f"{url}/tokenize", json={"model": "other", "prompt": "x"}).status_code == 404
    two = FakeModel("other")
    with running(create_app([model, two])) as url:
        unsaid = httpx.post(f"{url}/tokenize", json={"prompt": "x"})
        assert (unsaid.status_code, error_of(unsaid)["param"]) == (400, "model")
    model.engine.close()
    two.engine.close()


def test_the_command(tmp_path: Path) -> None:
    def key(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "edge_runtime.cli.main", "key", *words],
            env={**os.environ, "EDGE_GLM_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )

    assert key("list").stdout == ""
    made = key("add", "anna", "--rate-limit", "30")
    secret = made.stdout.strip()
    found = KeyRing(tmp_path / "keys.json").find(secret)
    assert found is not None
    assert found.per_minute == 30
    assert "Keep it" in made.stderr
    assert "anna  made" in key("list").stdout
    assert json.loads(key("list", "--json").stdout)[0]["per_minute"] == 30
    assert secret not in key("list", "--json").stdout
    assert key("add", "anna").returncode == 1
    assert key("rm", "anna").stdout == "removed anna\n"
    assert "there is no key" in key("rm", "anna").stderr
