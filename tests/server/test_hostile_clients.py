"""Clients that try to make the server fetch, open, tell or write what it should not."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_runtime.keys import KeyRing
from edge_runtime.server.app import create_app
from tests.server.served import CHAT, TEXT, FakeModel, error_of, running
from tests.tiers.house import LOCAL, TieredModel, house, task

NAMES = [
    "../../../etc/passwd",
    "/etc/passwd",
    "./fake",
    "fake/../fake",
    "file:///etc/passwd",
    "http://127.0.0.1:1/model.gguf",
    "hf:org/name",
    "pypi:name",
    "synthetic:tiny",
    "fake\x00",
    "fake\r\nx-evil: 1",
    "' OR 1=1 --",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_opens_only_what_is_served(name: str) -> None:
    model = FakeModel()
    with running(create_app(model)) as url:
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/completions", TEXT),
            ("/v1/embeddings", {"input": "x"}),
            ("/v1/responses", {"input": "x"}),
            ("/api/chat", {"messages": CHAT["messages"]}),
            ("/api/show", {}),
            ("/v1/models/stop", {}),
        ):
            answer = httpx.post(url + path, json={**body, "model": name})
            assert answer.status_code in (400, 404), path
            assert "x-evil" not in answer.headers
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "fake"
    model.engine.close()


PARTS: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "URL"}},
    {"type": "input_image", "image_url": "URL"},
    {"type": "input_file", "file_url": "URL"},
    {"type": "file", "file": {"file_data": "URL"}},
    {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
]


@pytest.mark.parametrize("part", PARTS, ids=range(len(PARTS)))
def test_a_client_makes_the_server_fetch_nothing(part: dict[str, Any]) -> None:
    model = FakeModel()
    with running(create_app(model)) as url, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        place = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        named = {
            key: dict.fromkeys(value, place) if isinstance(value, dict) else place if value == "URL" else value
            for key, value in part.items()
        }
        content = [named, {"type": "text", "text": place}]
        chat = httpx.post(
            f"{url}/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": content}]}
        )
        assert error_of(chat)["param"].startswith("messages[0].content[0]")
        response = httpx.post(
            f"{url}/v1/responses", json={"model": "fake", "input": [{"role": "user", "content": content}]}
        )
        assert response.status_code == 400
        with pytest.raises(TimeoutError):
            listener.accept()
    model.engine.close()


IDS = [
    "' OR '1'='1",
    "x'; DROP TABLE requests; --",
    "%2e%2e%2f",
    "chatcmpl-deferred-%",
    "%00",
    "chatcmpl-deferred-' --",
]


@pytest.mark.parametrize("name", IDS)
def test_ids_are_values_and_no_sql(name: str, tmp_path: Path) -> None:
    policy = LOCAL + task(mode="deferred", privacy="local-only")
    with house(tmp_path, policy) as here, running(create_app(TieredModel(here))) as url:
        kept = httpx.post(f"{url}/v1/chat/completions", json=CHAT).json()["id"]
        for method in ("GET", "DELETE"):
            assert httpx.request(method, f"{url}/v1/chat/completions/{name}").status_code == 404
            assert httpx.request(method, f"{url}/v1/responses/{name}").status_code == 404
        assert httpx.get(f"{url}/v1/chat/completions/{kept}").json()["id"] == kept


def test_no_answer_holds_a_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    ring = KeyRing(tmp_path / "keys.json")
    first, second, wrong = "own-s3cret-key", ring.add("anna"), "wrong-s3cret-key"
    model = FakeModel()
    told = []
    with running(create_app(model, api_key=first, keys=ring)) as url:
        for key in (first, second, wrong):
            headers = {"authorization": f"Bearer {key}"}
            for path in ("/", "/health", "/metrics", "/openapi.json", "/v1/models", "/api/ps", "/v1/models/nothing"):
                answer = httpx.get(url + path, headers=headers)
                told += [answer.text, str(answer.headers)]
            for body in (CHAT, {"model": key}, {}):
                answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
                told += [str(answer.headers)] + ([] if key in str(body) else [answer.text])
    model.engine.close()
    told += [caplog.text, (tmp_path / "keys.json").read_text()]
    for key in (first, second, wrong):
        assert not any(key in each for each in told)
