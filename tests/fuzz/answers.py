"""What the server may answer, whatever it was sent."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from devices.errors import LONGEST
from tests.fuzz.surface import Failure

ANSWER_SECONDS = 20.0
"""That a connection may be left without an answer. A wait, not a timing: the server's own limits are a fraction of a
second here."""
_MOST = 50_000_000


def ask(address: tuple[str, int], pieces: list[bytes]) -> tuple[int, http.client.HTTPMessage, bytes] | None:
    """Sends ``pieces`` and reads the first answer. None: the server hung up without one. Failure for one that is no
    HTTP, that breaks off or that does not come."""
    sent = b"".join(pieces)
    with socket.create_connection(address, timeout=ANSWER_SECONDS) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has answered already
        response = http.client.HTTPResponse(client, method=_method(sent))
        try:
            response.begin()
            return response.status, response.headers, response.read(_MOST)
        except (http.client.RemoteDisconnected, ConnectionResetError):
            return None
        except TimeoutError as error:
            raise Failure(f"no answer after {ANSWER_SECONDS:g} s") from error
        except (http.client.HTTPException, ValueError) as error:
            raise Failure(f"an answer that is no HTTP: {type(error).__name__}: {str(error)[:100]}") from error


def _method(sent: bytes) -> str:
    first = sent.lstrip(b"\r\n").partition(b" ")[0]
    return "HEAD" if first == b"HEAD" else "GET"


def check(path: str, status: int, headers: http.client.HTTPMessage, body: bytes, head: bool = False) -> bool:
    """Whether it is an answer rather than a refusal. Failure for what the API does not have."""
    kind = headers.get_content_type()
    if status >= 500 and status not in (502, 503):
        raise Failure(f"HTTP {status}: {body[:200]!r}")
    if status >= 400:
        if not head:
            check_refusal(path, status, body)
        return False
    if not 200 <= status < 400:
        raise Failure(f"HTTP {status}")
    if head or status in (204, 304):
        return True
    if kind == "text/event-stream":
        check_events(body)
    elif kind in ("application/json", "application/x-ndjson"):
        for line in body.splitlines() if kind == "application/x-ndjson" else [body]:
            _json(line)
    return True


def check_refusal(path: str, status: int, body: bytes) -> None:
    """OpenAI's error body, or Ollama's on its paths."""
    said = _json(body)
    error = said.get("error") if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else error if path.startswith("/api/") else None
    if not isinstance(message, str) or not message:
        raise Failure(f"HTTP {status} without an error body: {body[:200]!r}")
    if isinstance(error, dict) and set(error) != {"message", "type", "param", "code"}:
        raise Failure(f"HTTP {status} with another error body: {body[:200]!r}")
    if "Traceback" in message or "internal error" in message:
        raise Failure(f"HTTP {status} with {message[:200]!r}")
    if len(message) > LONGEST:
        raise Failure(f"HTTP {status} with a message of {len(message)} characters: {message[:100]!r}")


def check_events(body: bytes) -> None:
    """Every event is JSON, and the last says that it is the last."""
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]
    if not events:
        raise Failure(f"a stream without events: {body[:200]!r}")
    payloads = [_json(event) for event in events if event != b"[DONE]"]
    if any(b"internal error" in event for event in events):
        raise Failure(f"a stream that ends with an internal error: {events[-1][:200]!r}")
    last = payloads[-1] if payloads else {}
    ended = events[-1] == b"[DONE]" or (
        isinstance(last, dict) and ("error" in last or str(last.get("type", "")).startswith("response."))
    )
    if not ended:
        raise Failure(f"a stream without an end: {events[-1][:200]!r}")


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise Failure(f"an answer that is not JSON: {data[:200]!r}") from error
