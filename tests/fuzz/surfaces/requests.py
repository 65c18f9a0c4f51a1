"""HTTP requests over sockets, to a server that is open and to one that wants a key."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from typing import Any
from urllib.parse import urlsplit

from edge_runtime.embedder import EdgeEmbedder
from edge_runtime.server import context, protocol
from edge_runtime.server.app import ROUTES, create_app
from edge_runtime.template import ChatTemplate
from edge_runtime.tiers.local import LocalTier
from tests.exporters.encoder_folder import write_folder
from tests.fuzz.answers import ask, check
from tests.fuzz.log import Tracebacks
from tests.fuzz.mutation import EDGES, as_json, damage, disturb
from tests.fuzz.surface import Case, Failure, Json, Surface, Verdict, judged
from tests.server.served import CHAT, TEXT, FakeModel, running, schema_format

KEY = "secret"
KEYS = {"open": None, "keyed": KEY}
"""Of each server."""
_TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 3, "pattern": "[a-z]+"}, "b": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BODIES: tuple[tuple[str, Json], ...] = (
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "seed": 3}),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "stop": ["a", "b"], "logit_bias": {"5": -3},
     "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": 0.5,
     "repetition_penalty": 1.1, "user": "me", "metadata": {"a": "b"}}),
    ("/v1/chat/completions", CHAT | {"response_format": schema_format(_SCHEMA)}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "grammar", "syntax": "regex",
     "definition": "(a|b){1,3}"}}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "grammar", "syntax": "lark",
     "definition": 'start: "a" x\nx: /[a-z]/ | "(" x ")"'}}),
    ("/v1/chat/completions", CHAT | {"tools": [_TOOL], "tool_choice": "auto", "parallel_tool_calls": False}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content":
     [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": None, "tool_calls": [_CALL]},
     {"role": "tool", "tool_call_id": "1", "content": "2"}, {"role": "user", "content": "b"}]}),
    ("/v1/completions", TEXT),
    ("/v1/completions", TEXT | {"prompt": ["a", "b"], "stream": True, "logprobs": 2, "n": 2}),
    ("/v1/completions", TEXT | {"prompt": [[1, 2], [3]], "seed": 1}),
    ("/v1/responses", {"model": "fake", "input": "Hi", "max_output_tokens": 3, "stream": True}),
    ("/v1/responses", {"model": "fake", "instructions": "x", "input": [{"role": "user", "content": [{"type":
     "input_text", "text": "Hi"}]}], "max_output_tokens": 3, "text": {"format": {"type": "text"}}, "store": True,
     "temperature": 0.1, "top_p": 0.5, "metadata": {"a": "b"}}),
    ("/v1/embeddings", {"model": "encoder", "input": ["a", "b"], "encoding_format": "float"}),
    ("/tokenize", {"model": "fake", "prompt": "Hi", "add_special_tokens": True}),
    ("/tokenize", {"model": "fake", "messages": CHAT["messages"]}),
    ("/detokenize", {"model": "fake", "tokens": [1, 2, 300]}),
    ("/api/chat", {"model": "fake", "messages": CHAT["messages"], "stream": True, "options": {"num_predict": 3,
     "temperature": 0.1, "top_k": 3, "stop": ["a"], "seed": 4}, "keep_alive": "5m", "format": "json"}),
    ("/api/generate", {"model": "fake", "prompt": "Hi", "system": "x", "stream": False, "options": {"num_predict": 3},
     "raw": False}),
    ("/api/embed", {"model": "encoder", "input": "a", "truncate": True}),
    ("/api/show", {"model": "fake"}),
    ("/v1/models/stop", {"model": "other"}),
)  # fmt: skip
_SOUND = {path for path, _ in BODIES if path != "/v1/models/stop"}
_LINES = (
    b"content-length: -1", b"content-length: 5", b"content-length: 99999999999999999999", b"content-length: 1e3",
    b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"transfer-encoding: \x0bchunked",
    b"expect: 100-continue", b"connection: upgrade\r\nupgrade: websocket", b"upgrade: h2c", b"connection: keep-alive",
    b"content-encoding: gzip", b"content-type: text/plain; charset=utf-7", b"content-type: multipart/form-data",
    b"origin: http://evil.example", b"origin: null", b"host: ", b"host: evil.example", b"host: [::1", b"host: a\x00b",
    b"authorization: Bearer \xff\xfe", b"authorization: " + b"x" * 5000, b"cookie: " + b"a=b; " * 3000,
    b"x: " + b"y" * 70_000, b"\r\n".join(b"x-%d: y" % number for number in range(500)), b"no colon", b": empty",
    b" folded: x", b"x\x00y: z", b"x: \x7f\x1b[31m", b"range: bytes=0-,0-,0-", b"if-none-match: *",
    b"x-edge-glm-tier: a", b"accept: text/html;q=\xff", b"x-request-id: \r\n\r\n", b"idempotency-key: a",
    b"forwarded: for=\"[\"",
)  # fmt: skip
_METHODS = (
    b"POST",
    b"GET",
    b"PUT",
    b"DELETE",
    b"HEAD",
    b"OPTIONS",
    b"PATCH",
    b"CONNECT",
    b"TRACE",
    b"X" * 3000,
    b"",
    b"po\x00",
)
_TARGETS = (
    b"*", b"http://other/v1/models", b"//x", b"/v1/models/..%2f..%2fetc%2fpasswd", b"/%00", b"/%ff%fe",
    b"/v1/models/%zz", b"/v1/models/" + b"a" * 9000, b"/v1/models?" + b"a=b&" * 2000, b"/page/../../etc/passwd",
    b"/\xff", b"/a b", b"",
    b"/v1/chat/completions/x%0d%0aset-cookie:a", b"/v1/responses/\x7f", b"/#", b"/v1/models/fake/", b"/metrics",
)  # fmt: skip


NO_ROOM = "HTTP 503"


class Requests(Surface):
    """A case is what goes over the wire, to the server that it names."""

    name = "requests"
    weight = 20
    batch = 32

    def prepare(self) -> list[Case]:
        self._paths = [route.path for route in ROUTES]
        return [Case("open", request(path, json.dumps(body).encode())) for path, body in BODIES if path in _SOUND]

    def make(self, rng: random.Random) -> Case:
        path, body = rng.choice(BODIES)
        name = "keyed" if rng.random() < 0.2 else "open"
        key = KEY if name == "keyed" and rng.random() < 0.9 else None
        way = rng.random()
        if way < 0.6:
            return Case(
                name, request(path, as_json(rng, disturb(rng, body, self.made(rng), rng.choice((1, 1, 3)))), key=key)
            )
        data = json.dumps(body).encode()
        if way < 0.7:
            return Case(name, request(path, damage(rng, data), key=key))
        if way < 0.8:
            return Case(name, damage(rng, request(path, data, key=key)))
        return Case(name, _odd(rng, rng.choice((path, rng.choice(self._paths))), data, key))

    def open(self) -> None:
        # so short that clients who send no more are told so within a case
        protocol.HEAD_SECONDS = 0.5
        context.BODY_SECONDS = 0.5
        self._stack = ExitStack()
        self.models = {name: self._stack.enter_context(closing(FakeModel(max_context=1024))) for name in KEYS}
        _takes_tools(self.models["keyed"])
        write_folder(self.folder / "encoder")
        encoder = self._stack.enter_context(EdgeEmbedder(str(self.folder / "encoder")))
        apps = {
            "open": create_app(self.models["open"], embedders=[encoder], max_body=100_000),
            "keyed": create_app(
                self.models["keyed"], api_key=KEY, max_body=100_000, per_minute=100_000, origins=["http://a"]
            ),
        }
        self._addresses: dict[str, tuple[str, int]] = {}
        for name, app in apps.items():
            url = urlsplit(self._stack.enter_context(running(app)))
            self._addresses[name] = (str(url.hostname), int(url.port or 0))
        self._log = self._stack.enter_context(Tracebacks())  # uvicorn has set up its loggers by now
        self._threads = self._stack.enter_context(ThreadPoolExecutor(self.batch))

    def close(self) -> None:
        self._stack.close()

    def run(self, case: Case) -> None:
        answer = ask(self._addresses[case.name], _pieces(case))
        found = re.match(rb"\s*(\S*)[ \t]+(\S*)", case.data)
        method, path = (found[1], found[2].decode(errors="replace")) if found else (b"", "")
        if answer is None:
            if b"\r\n\r\n" in case.data and b"\n\n" not in case.data:
                raise Failure("the server hung up without an answer")
            raise Refused("it hung up on a head without an end")
        if not check(path, *answer, head=method == b"HEAD"):
            raise Refused(NO_ROOM if answer[0] == 503 else f"HTTP {answer[0]}")

    def run_all(self, cases: Sequence[Case]) -> Iterator[tuple[int, Verdict]]:
        for start in range(0, len(cases), self.batch):
            some = range(start, min(start + self.batch, len(cases)))
            asked = {self._threads.submit(judged, self, cases[place]): place for place in some}
            verdicts = {asked[each]: each.result() for each in as_completed(asked)}
            for place, verdict in verdicts.items():
                if verdict.detail == NO_ROOM:  # which may be while others are asked
                    verdicts[place] = self._alone(cases[place])
            wrong = self._wrong_afterwards()
            if wrong is not None and len(some) > 1:  # whose fault it is shows when they come one by one
                for place in some:
                    verdict = self._alone(cases[place])
                    after = self._wrong_afterwards()
                    verdicts[place] = verdict if after is None else Verdict("failed", after, verdict.seconds)
            elif wrong is not None:
                verdicts[start] = Verdict("failed", wrong)
            yield from verdicts.items()

    def _alone(self, case: Case) -> Verdict:
        verdict = judged(self, case)
        if verdict.detail == NO_ROOM:
            return Verdict("failed", f"{NO_ROOM}, though nothing else was asked", verdict.seconds)
        return verdict

    def _wrong_afterwards(self) -> str | None:
        """Whether the servers still do what they should."""
        for name, key in KEYS.items():
            good = judged(self, Case(name, request("/v1/chat/completions", json.dumps(CHAT).encode(), key=key)))
            if good.kind != "accepted":
                return f"a good request to the {name} server afterwards is {good.kind}: {good.detail}"
        return self._log.take()


def _takes_tools(model: FakeModel) -> None:
    """By its chat template, as most models do."""
    model.template = ChatTemplate(
        "{% for t in tools or [] %}<tool_call>{{ t | tojson }}{% endfor %}"
        '{"name": , "arguments": }'
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "<|im_end|>{% endfor %}"
    )
    limit = model.max_context
    model.tier = LocalTier(model.engine, model.tokenizer, model.template, max_prompt=limit, max_context=limit)


class Refused(context.InvalidRequest):
    """The server said no, as it should."""


def request(path: str, body: bytes, *, key: str | None = None, method: bytes = b"POST") -> bytes:
    lines = [method + b" " + path.encode() + b" HTTP/1.1", b"host: localhost", b"connection: close"]
    lines += [b"content-type: application/json", b"content-length: %d" % len(body)]
    lines += [] if key is None else [b"authorization: Bearer " + key.encode()]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _odd(rng: random.Random, path: str, body: bytes, key: str | None) -> bytes:
    """A request whose line, headers or framing are not as they should be."""
    target = rng.choice(_TARGETS) if rng.random() < 0.3 else path.replace("{model:path}", "fake").encode()
    method = rng.choice(_METHODS) if rng.random() < 0.4 else b"POST"
    version = rng.choice((b"HTTP/1.1",) * 8 + (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"", b"HTTP/1.1 x"))
    lines = [b" ".join((method, target, version)), b"host: localhost", b"content-length: %d" % len(body)]
    lines += [] if key is None else [b"authorization: Bearer " + key.encode()]
    for _ in range(rng.randint(0, 3)):
        lines.insert(rng.randint(1, len(lines)), rng.choice(_LINES))
    if rng.random() < 0.3:
        lines = [line for line in lines if not line.startswith(b"content-length") or rng.random() < 0.2]
        lines.append(b"transfer-encoding: chunked")
        size = rng.choice(
            (b"%x" % len(body), b"-1", b"ffffffffffffffff", b"%x" % rng.choice(EDGES), b"", b"5;x=" + b"y" * 99)
        )
        body = size + b"\r\n" + body + rng.choice((b"\r\n0\r\n\r\n", b"\r\n", b"", b"\r\n0\r\nx: y\r\n\r\n"))
    if rng.random() < 0.8:
        lines.append(b"connection: close")
    ending = rng.choice((b"\r\n",) * 9 + (b"\n", b"\r"))
    return ending.join(lines) + rng.choice((2 * ending,) * 9 + (ending,)) + body


def _pieces(case: Case) -> list[bytes]:
    """Now and then in two packets."""
    if sum(case.data) % 8:
        return [case.data]
    half: Any = len(case.data) // 2
    return [case.data[:half], case.data[half:]]
