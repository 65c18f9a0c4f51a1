"""What a tier elsewhere may send: the bytes of an answer over a socket, up to what a client of ours is told."""

from __future__ import annotations

import gzip
import json
import random
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

from edge_runtime.server.app import create_app
from tests.fuzz.answers import ask, check
from tests.fuzz.log import Tracebacks
from tests.fuzz.mutation import NOT_UTF8, Made, as_json, damage, disturb
from tests.fuzz.surface import Case, Failure, Surface
from tests.fuzz.surfaces.requests import Refused, request
from tests.server.served import CHAT
from tests.tiers.house import TieredModel, cloud, house, task
from tests.tiers.upstream import DONE, HEADERS, USAGE, Connection, delta, event, stream, upstream

_CALLS = [{"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
_EVENTS: tuple[tuple[bytes, ...], ...] = (
    (delta("Hello"), delta(" there"), delta(finish="stop"), USAGE, DONE),
    (delta("a", finish="length"), DONE),
    (delta(tool_calls=_CALLS), delta(finish="tool_calls"), USAGE, DONE),
    (delta(refusal="no"), delta(finish="content_filter"), DONE),
    (event({"error": {"message": "it broke", "type": "server_error", "code": 500}}),),
    (b": comment\n\n", b"event: x\nid: 7\nretry: 10\n", delta("a"), b"\r\n\r\n", delta(finish="stop"), DONE),
)
_PAYLOADS = {
    each: json.loads(each.removeprefix(b"data: "))
    for events in _EVENTS
    for each in events
    if each.startswith(b"data: {")
}
_WHOLE = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}]}
_HEADS = (
    HEADERS,
    HEADERS.replace(b"200 OK", b"200"),
    HEADERS.replace(b"text/event-stream", b"application/json"),
    HEADERS.replace(b"text/event-stream", b"text/event-stream; charset=utf-16"),
    HEADERS.replace(b"connection: close", b"connection: close\r\ncontent-length: 100"),
    HEADERS.replace(b"connection: close", b"transfer-encoding: chunked"),
    HEADERS.replace(b"connection: close", b"content-encoding: br"),
    HEADERS.replace(b"200 OK", b"100 Continue"),
    HEADERS.replace(b"200 OK", b"204 No Content"),
    HEADERS.replace(b"200 OK", b"302 Found\r\nlocation: http://localhost:1/"),
    HEADERS.replace(b"200 OK", b"400 Bad"),
    HEADERS.replace(b"200 OK", b"401 No"),
    HEADERS.replace(b"200 OK", b"429 Slow\r\nretry-after: 1e999"),
    HEADERS.replace(b"200 OK", b"429 Slow\r\nretry-after: Fri, 31 Dec 9999 23:59:59 -2359"),
    HEADERS.replace(b"200 OK", b"429 Slow\r\nretry-after: nan"),
    HEADERS.replace(b"200 OK", b"500 Broken"),
    HEADERS.replace(b"200 OK", b"999 What"),
    HEADERS.replace(b"connection", b"x: " + b"y" * 90_000 + b"\r\nconnection"),
)
_BOMB = gzip.compress(b"data: " + b"x" * 2**20 + b"\n" * 2)
_BOMB_HEAD = HEADERS.replace(b"connection: close", b"connection: close\r\ncontent-encoding: gzip")
BOMB_MEMBERS = 400
"""A megabyte each, once they are unpacked."""


class Upstreams(Surface):
    """A case is the upstream's answer; its name says whether our client streams."""

    name = "upstream"
    weight = 10

    def prepare(self) -> list[Case]:
        self._seeds = [stream(*events) for events in _EVENTS[:4]]
        return [Case(name, data) for name in ("whole", "stream") for data in self._seeds[:1]]

    def make(self, rng: random.Random) -> Case:
        name = rng.choice(("whole", "stream"))
        events = list(rng.choice(_EVENTS))
        way = rng.random()
        if way < 0.005:
            return Case(name, _BOMB_HEAD + _BOMB * rng.choice((1, BOMB_MEMBERS)))
        if way < 0.25:
            return Case(name, damage(rng, stream(*events), self._seeds))
        head = rng.choice(_HEADS) if rng.random() < 0.3 else HEADERS
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(events))
            events[place : place + rng.choice((0, 1))] = [_event(rng, events[place], self.made(rng))]
        if rng.random() < 0.1:
            events *= rng.choice((2, 100))
        return Case(name, head + b"".join(events))

    def open(self) -> None:
        self._stack = ExitStack()
        self._upstream = self._stack.enter_context(upstream(self._script))
        self._data = b""
        options = {
            "retry": {"attempts": 1},
            "breaker": {"failures": 10**9},
            "timeouts": {"connect": 5.0, "first_token": 5.0, "read": 5.0, "total": 10.0},
        }
        self._policy = cloud(self._upstream.url.replace("localhost", "127.0.0.1"), **options) + task()
        self._versions = 0
        self._house = self._stack.enter_context(house(self.folder, self._policy))
        url = urlsplit(self._stack.enter_context(running_app(TieredModel(self._house))))
        self._address = (str(url.hostname), int(url.port or 0))
        self._log = self._stack.enter_context(Tracebacks())

    def close(self) -> None:
        self._stack.close()

    def run(self, case: Case) -> None:
        self._data = case.data
        self._upstream.asked.clear()
        body = CHAT | {"stream": case.name == "stream"}
        asked = [request("/v1/chat/completions", json.dumps(body).encode())]
        answer = ask(self._address, asked)
        if answer is not None and b"left alone" in answer[2]:  # as an answer before has asked for
            self._versions += 1
            self._house.write(self._policy.replace('"big"', f'"big-{self._versions}"'))
            answer = ask(self._address, asked)
        if answer is None:
            raise Failure("the server hung up without an answer")
        accepted = check("/v1/chat/completions", *answer)
        logged = self._log.take()
        if logged is not None:
            raise Failure(logged)
        if not accepted or b'"error"' in answer[2]:
            raise Refused(f"HTTP {answer[0]}: {answer[2][:200]!r}")

    def _script(self, client: Connection) -> None:
        client.send(self._data)


def running_app(model: TieredModel) -> Any:
    from tests.server.served import running

    return running(create_app(model))


def _event(rng: random.Random, sound: bytes, made: Made) -> bytes:
    """Another event in its place."""
    way = rng.randrange(8)
    if way < 5 and sound in _PAYLOADS:
        data = as_json(rng, disturb(rng, _PAYLOADS[sound], made))
        return b"data: " + data.replace(b"\n", b"") + rng.choice((b"\n\n", b"\r\n\r\n", b"\r\r", b"\n"))
    if way == 5:
        return b"data: " + json.dumps(_WHOLE).encode() + b"\n\n"
    if way == 6:
        return (
            b"data: "
            + rng.choice((b"[DONE] ", b"[DONE", b"", b"null", b"[]", b"{}", b"x" * 90_000, *NOT_UTF8))
            + b"\n\n"
        )
    return rng.choice(
        (b"\n", b"\0\n\n", b"data\n\n", b"data:" * 1000, b":" + b"x" * 90_000, b"id: \0\n\n", b"retry: 9e9\n")
    )
