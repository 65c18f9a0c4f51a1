"""One request to an OpenAI-compatible server, with the times at which its answer arrives.

Over :mod:`http.client`: a thread per request that blocks in its socket adds less of its own than an HTTP library.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from edge_runtime.bench.timing import StreamTimes
from edge_runtime.errors import ConfigError, EdgeError

TIMEOUT_S = 600
"""Between two pieces of an answer; a server under load may keep a request waiting."""


class RequestFailed(EdgeError):
    """A request that was not answered whole. ``kind``: the HTTP status, ``connection`` or ``stream``."""

    def __init__(self, message: str, kind: str = "connection") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Reply:
    """A whole answer. Counts are the server's own."""

    times: StreamTimes
    prompt_tokens: int
    completion_tokens: int


class Client:
    """A server's API. ConfigError if ``url`` is none."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname)
            self._port = parts.port
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(f"--url must be like http://127.0.0.1:8000, not {url!r}")
        self.url = url
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        path = parts.path.rstrip("/")
        self._base = path if path.endswith("/v1") else f"{path}/v1"
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        """What the server has. ConfigError if it cannot be reached or is no OpenAI-compatible server."""
        try:
            data = json.loads(b"".join(self._send("GET", "/models", None)))
            return [str(model["id"]) for model in data["data"]]
        except RequestFailed as error:
            hint = "; give its --api-key" if error.kind in ("401", "403") else ""
            raise ConfigError(f"{self.url}: {error}{hint}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{self.url} is not an OpenAI-compatible server: {self._base}/models gives no list of models"
            ) from error

    def ask(
        self,
        endpoint: Literal["completions", "chat"],
        body: dict[str, Any],
        prompt: str,
        submitted: float | None = None,
    ) -> Reply:
        """Stream the answer to ``prompt``. ``submitted``: when it was due, if not now. Raises RequestFailed."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        if endpoint == "chat":
            path, body["messages"] = "/chat/completions", [{"role": "user", "content": prompt}]
        else:
            path, body["prompt"] = "/completions", prompt
        payload = json.dumps(body).encode()
        submitted = time.perf_counter() if submitted is None else submitted
        arrivals: list[float] = []
        usage: dict[str, Any] | None = None
        for event in self._events(path, payload):
            if _text(event):
                arrivals.append(time.perf_counter())
            usage = event.get("usage") or usage
        if usage is None:
            raise RequestFailed("the server's streams come without usage, so tokens cannot be counted", "stream")
        if not arrivals:
            raise RequestFailed("the answer has no text", "stream")
        completion = int(usage["completion_tokens"])
        return Reply(StreamTimes(submitted, _spread(arrivals, completion)), int(usage["prompt_tokens"]), completion)

    def _events(self, path: str, payload: bytes) -> Iterator[dict[str, Any]]:
        """The stream's events. RequestFailed unless it ends with ``[DONE]``."""
        for line in self._send("POST", path, payload):
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError as error:
                raise RequestFailed(f"an event of the stream is not JSON: {data[:80]!r}", "stream") from error
            if not isinstance(event, dict) or event.get("error"):
                raise RequestFailed(f"the stream broke off: {_message(data)}", "stream")
            yield event
        raise RequestFailed("the stream ended without [DONE]", "stream")

    def _send(self, method: str, path: str, payload: bytes | None) -> Iterator[bytes]:
        """The lines of the answer, as they come."""
        connection: http.client.HTTPConnection
        if self._secure:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request(method, self._base + path, payload, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise RequestFailed(f"HTTP {response.status}: {_message(response.read())}", str(response.status))
            yield from response
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            text = f"the connection to {self._host} failed ({reason}); is the server running?"
            raise RequestFailed(text) from error
        finally:
            connection.close()


def _text(event: dict[str, Any]) -> str:
    """What the event adds to the answer; a reasoning model's thoughts are tokens as well."""
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return choices[0].get("text") or delta.get("content") or delta.get("reasoning_content") or ""


def _spread(arrivals: list[float], tokens: int) -> tuple[tuple[float, int], ...]:
    """Which piece had how many tokens is not told: one each as far as they go; those that remain came with the last."""
    counts = [int(piece < tokens) for piece in range(len(arrivals))]
    counts[-1] += max(tokens - len(arrivals), 0)
    return tuple(zip(arrivals, counts, strict=True))


def _message(body: bytes) -> str:
    """The message of OpenAI's error body, else the start of whatever it is."""
    try:
        error = json.loads(body)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:300] or "no message"
