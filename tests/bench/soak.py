"""Many clients at once, mixed and leaving at random: ``python -m tests.bench.soak PACKAGE [--clients 64 --minutes 5]``.

Starts ``edge-glm serve`` and asks it for what was asked alone before, so that every answer is known: chats, streams,
several completions, tools, forms, responses, Ollama's lines. An answer must be the same, or a clear error (503 with
Retry-After); streams are left in the middle and connections are cut. Prints what came, and the server's memory and
queues before and after. Exits with 1 if an answer was wrong, or something stayed behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import httpx

from edge_runtime.engine import TRIM_S

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue?",
    "Count to five.",
    "What is a heat pump? " + "It stands in the cellar and hums at night. " * 20,
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}
_QUIET_S = TRIM_S + 2
"""After which memory that only a busier time has needed has gone back to the system."""
_SAMPLES = 5
"""Of memory, evenly over the time: what grows without end shows in them, what heaps keep does not."""
GROWTH = 1.15
"""Memory may end at so much of what it was after the first answers: heaps keep some of what they had."""

Request = tuple[str, dict[str, Any]]


def requests(model: str) -> list[Request]:
    """Path and body of each, all greedy."""
    made: list[Request] = []
    for index, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        chat = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24 + 8 * index}
        made += [
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"stream": True}),
            ("/v1/completions", {"model": model, "prompt": question, "temperature": 0, "max_tokens": 20, "n": 2}),
            ("/v1/responses", {"model": model, "input": question, "temperature": 0, "max_output_tokens": 24}),
            ("/api/chat", {"model": model, "messages": messages, "options": {"temperature": 0, "num_predict": 24}}),
        ]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    made.append(("/v1/chat/completions", made[0][1] | {"response_format": form, "max_tokens": 60}))
    forced = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60}
    made.append(("/v1/chat/completions", made[0][1] | forced))
    return made


def said(path: str, body: dict[str, Any], text: str) -> Any:
    """What an answer says, without ids and times."""
    if path == "/api/chat":
        return "".join(json.loads(line)["message"]["content"] for line in text.splitlines())
    if body.get("stream"):
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    answer = json.loads(text)
    if path == "/v1/responses":
        return [part["text"] for item in answer["output"] for part in item["content"]]
    if path == "/v1/completions":
        return [choice["text"] for choice in answer["choices"]]
    message = answer["choices"][0]["message"]
    return message["content"], [call["function"] for call in message.get("tool_calls") or ()]


class Soak:
    def __init__(self, url: str, model: str, seed: int) -> None:
        self._url = url
        self._requests = requests(model)
        self._random = random.Random(seed)
        self._expected: list[Any] = []
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    async def learn(self) -> None:
        """Each alone, one after the other."""
        async with httpx.AsyncClient(base_url=self._url, timeout=120) as client:
            for path, body in self._requests:
                answer = await client.post(path, json=body)
                answer.raise_for_status()
                self._expected.append(said(path, body, answer.text))

    async def client(self, until: float) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=300) as client:
            while time.monotonic() < until:
                number = self._random.randrange(len(self._requests))
                leaves = self._random.random() < 0.3
                try:
                    await (self._leave if leaves else self._ask)(client, number)
                except httpx.HTTPError as error:
                    self.problems.append(f"{self._requests[number][0]}: {type(error).__name__}: {error}")

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        path, body = self._requests[number]
        answer = await client.post(path, json=body)
        if answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1:
            self.counts["refused"] += 1
            await asyncio.sleep(self._random.random())
        elif answer.status_code != 200:
            self.problems.append(f"{path}: {answer.status_code} {answer.text[:200]}")
        elif (found := said(path, body, answer.text)) != self._expected[number]:
            self.problems.append(f"{path}: {found!r} for {self._expected[number]!r}"[:400])
        else:
            self.counts["right"] += 1

    async def _leave(self, client: httpx.AsyncClient, number: int) -> None:
        """Now, or after some of the answer."""
        path, body = self._requests[number]
        task = asyncio.create_task(self._read(client, path, body, self._random.randrange(2000)))
        await asyncio.sleep(self._random.random() * 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.counts["left"] += 1

    async def _read(self, client: httpx.AsyncClient, path: str, body: dict[str, Any], most: int) -> None:
        async with client.stream("POST", path, json=body) as answer:
            read = 0
            async for piece in answer.aiter_bytes():
                read += len(piece)
                if read > most:
                    return


def rss(pid: int) -> float:
    """MiB."""
    found = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def gauges(url: str, *names: str) -> list[float]:
    page = httpx.get(f"{url}/metrics").text
    return [float(row.rsplit(" ", 1)[1]) for row in page.splitlines() if row.startswith(names)]


def idle(url: str) -> bool:
    names = ("edge_glm_requests_running", "edge_glm_requests_waiting", "edge_glm_kv_cache_running_tokens")
    return not any(gauges(url, *names))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("package")
    parser.add_argument("--device", default="edge:cpu")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "edge_runtime.cli.main", "serve", arguments.package]
    command += ["--device", arguments.device, "--port", "0", "--prefix-store", "0", "--batch-invariant"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL, env=os.environ) as server,
    ):
        try:
            return soak(_url(server, log), server.pid, arguments.clients, arguments.minutes, arguments.seed)
        finally:
            server.terminate()


def _url(server: subprocess.Popen[bytes], log: IO[str]) -> str:
    while server.poll() is None:
        time.sleep(0.1)
        log.seek(0)
        if found := re.search(r"serving on (\S+)", log.read()):
            return found[1]
    raise SystemExit("the server did not start")


def soak(url: str, pid: int, clients: int, minutes: float, seed: int = 0) -> int:
    """1 if something is wrong."""
    soaked = Soak(url, httpx.get(f"{url}/v1/models").json()["data"][0]["id"], seed)
    asyncio.run(soaked.learn())
    time.sleep(_QUIET_S)
    before = rss(pid)
    meanwhile: list[float] = []

    async def watch() -> None:
        for _ in range(_SAMPLES):
            await asyncio.sleep(60 * minutes / (_SAMPLES + 1))
            meanwhile.append(rss(pid))

    async def run() -> None:
        until = time.monotonic() + 60 * minutes
        await asyncio.gather(watch(), *(soaked.client(until) for _ in range(clients)))

    asyncio.run(run())
    deadline = time.monotonic() + 10
    while not (settled := idle(url)) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(_QUIET_S)
    after = rss(pid)
    told = ", ".join(f"{count} {name}" for name, count in sorted(soaked.counts.items()))
    print(f"{clients} clients, {minutes:g} minutes: {told}, {len(soaked.problems)} wrong")
    kept = sum(gauges(url, "edge_glm_prefix_cache_tokens"))
    between = ", ".join(f"{each:.0f}" for each in meanwhile)
    print(
        f"memory {before:.0f} MiB before, {between} meanwhile, {after:.0f} after; "
        f"{kept:.0f} tokens of prefixes kept; {'nothing' if settled else 'SOMETHING'} left running"
    )
    for problem in soaked.problems[:10]:
        print(problem)
    return int(bool(soaked.problems) or not settled or after > GROWTH * before or not soaked.counts["right"])


if __name__ == "__main__":
    sys.exit(main())
