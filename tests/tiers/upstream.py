"""A server that does as it is told, over real sockets: the other end of a remote tier, with all its faults."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

HEADERS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


@dataclass
class Asked:
    """A request as it came over the wire."""

    raw: bytes
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Connection:
    """One request of a client, for a script to answer."""

    socket: socket.socket
    asked: Asked
    gone: threading.Event = field(default_factory=threading.Event)
    """The server is closing."""

    def send(self, data: bytes) -> None:
        with suppress(OSError):
            self.socket.sendall(data)

    def wait_for_the_client_to_leave(self) -> None:
        self.socket.settimeout(0.05)
        while not self.gone.is_set():
            try:
                if not self.socket.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def reset(self) -> None:
        """Closes so that the client's next read fails."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


Script = Callable[[Connection], None]


class Upstream:
    """Answers its first request by the first script, and so on; the last script answers all that follow."""

    def __init__(self, scripts: Sequence[Script], context: ssl.SSLContext | None = None) -> None:
        self.scripts = list(scripts)
        self.asked: list[Asked] = []
        self.left = threading.Semaphore(0)
        """Released whenever a script has returned."""
        self._context = context
        self._gone = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._main = threading.Thread(target=self._accept)
        self._main.start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"{'https' if self._context else 'http'}://localhost:{self.port}/v1"

    def close(self) -> None:
        self._gone.set()
        self._main.join()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._gone.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(20)
        try:
            if self._context is not None:
                client = self._context.wrap_socket(client, server_side=True)
            asked = _read(client)
        except (OSError, ValueError):
            client.close()
            return
        with self._lock:
            script = self.scripts[min(len(self.asked), len(self.scripts) - 1)]
            self.asked.append(asked)
        try:
            script(Connection(client, asked, self._gone))
        finally:
            with suppress(OSError):
                client.close()
            self.left.release()


@contextmanager
def upstream(*scripts: Script, context: ssl.SSLContext | None = None) -> Iterator[Upstream]:
    server = Upstream(scripts, context)
    try:
        yield server
    finally:
        server.close()


def _read(client: socket.socket) -> Asked:
    raw = b""
    while b"\r\n\r\n" not in raw:
        piece = client.recv(65536)
        if not piece:
            raise ValueError("the client has left")
        raw += piece
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", 0)):
        body += client.recv(65536)
    return Asked(head + b"\r\n\r\n" + body, first.split()[1], headers, json.loads(body))


# --- scripts ----------------------------------------------------------------------------------------------------------


def event(payload: Any) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def delta(text: str | None = None, finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    content = {} if text is None else {"content": text}
    return event({"choices": [{"index": index, "delta": {**content, **more}, "finish_reason": finish}]})


DONE = b"data: [DONE]\n\n"
USAGE = event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}})


def stream(*pieces: bytes) -> bytes:
    return HEADERS + delta("", role="assistant") + b"".join(pieces)


def answers(*texts: str) -> Script:
    """A whole answer, a piece for each text."""
    return lambda client: client.send(stream(*map(delta, texts), delta(finish="stop"), USAGE, DONE))


def says(data: bytes) -> Script:
    """These bytes, and the end."""
    return lambda client: client.send(data)


def status(code: int, body: Any = None, **headers: str) -> Script:
    payload = json.dumps(body or {"error": {"message": f"it is {code}"}}).encode()
    lines = [f"HTTP/1.1 {code} X", f"content-length: {len(payload)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return says("\r\n".join(lines).encode() + b"\r\n\r\n" + payload)


def stalls(data: bytes = b"") -> Script:
    """These bytes, and then nothing."""

    def script(client: Connection) -> None:
        client.send(data)
        client.wait_for_the_client_to_leave()

    return script


def resets(data: bytes) -> Script:
    def script(client: Connection) -> None:
        client.send(data)
        threading.Event().wait(0.1)  # a reset throws away what the client has not read yet
        client.reset()

    return script
