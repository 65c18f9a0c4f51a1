"""Clients of the long soak, in a process of their own: ``python -m tests.survive.soak_clients URL FILE [COUNT SEED]``.

FILE has what each request is answered when it is asked alone. Without COUNT it is written; with it, so many requests
are sent, drawn by SEED, many at once and some of them left in the middle, and what came of them is printed as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

CLIENTS = 24
LEAVE = 0.15
"""The share of requests whose client leaves before the end."""
AWAY = "the answer is of another machine"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
LENGTHS = (1, 3, 10, 30)

Request = tuple[str, str, dict[str, Any]]
"""Kind, path and body."""


def requests() -> list[Request]:
    """All greedy, so that each has one right answer, whatever runs beside it."""
    made: list[Request] = []
    for index, length in enumerate(LENGTHS):
        text = f"{index}. the pump hums at night " * length
        chat = {"model": "main", "messages": [{"role": "user", "content": text}], "temperature": 0}
        chat["max_tokens"] = 4 + 10 * index
        made += [
            ("chat", "/v1/chat/completions", chat),
            ("stream", "/v1/chat/completions", chat | {"stream": True}),
            (
                "several",
                "/v1/completions",
                {"model": "main", "prompt": text, "temperature": 0, "max_tokens": 9, "n": 3},
            ),
            ("response", "/v1/responses", {"model": "main", "input": text, "temperature": 0, "max_output_tokens": 9}),
            (
                "ollama",
                "/api/chat",
                {"model": "main", "messages": chat["messages"], "options": {"temperature": 0, "num_predict": 9}},
            ),
            (
                "other model",
                "/v1/completions",
                {"model": "bc"[index % 2], "prompt": text, "temperature": 0, "max_tokens": 9},
            ),
            ("away", "/v1/chat/completions", chat | {"user": "away"}),
            ("away, streamed", "/v1/chat/completions", chat | {"user": "away", "stream": True}),
            ("embedding", "/v1/embeddings", {"model": "encoder", "input": text[:80]}),
        ]
    chat = made[0][2] | {"max_tokens": 40}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    made += [
        ("form", "/v1/chat/completions", chat | {"response_format": form}),
        ("tool", "/v1/chat/completions", chat | {"tools": [TOOL], "tool_choice": "required"}),
        ("tool, streamed", "/v1/chat/completions", chat | {"tools": [TOOL], "tool_choice": "required", "stream": True}),
        ("deferred", "/v1/chat/completions", chat | {"service_tier": "flex"}),
        ("bad", "/v1/chat/completions", chat | {"max_tokens": -1}),
        ("too long", "/v1/completions", {"model": "main", "prompt": "x" * 20_000, "max_tokens": 1}),
        ("unload", "/v1/models/stop", {"model": "b"}),
    ]
    return made


def said(kind: str, body: dict[str, Any], text: str) -> Any:
    """What an answer says, without ids and times."""
    if kind == "ollama":
        return "".join(json.loads(line)["message"]["content"] for line in text.splitlines())
    if body.get("stream"):
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        failed = next((event["error"] for event in events if "error" in event), None)
        if failed is not None:
            return {"error": failed["code"]}
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
        told = "".join(delta.get("content") or "" for delta in deltas)
        return [told, "".join((call.get("name") or "") + (call.get("arguments") or "") for call in calls)]
    answer = json.loads(text)
    if kind == "embedding":
        return [round(number, 4) for number in answer["data"][0]["embedding"]]
    if kind == "response":
        return [part["text"] for item in answer["output"] for part in item["content"]]
    if "choices" not in answer:
        return sorted(answer)
    if "text" in answer["choices"][0]:
        return [choice["text"] for choice in answer["choices"]]
    message = answer["choices"][0]["message"]
    return [message["content"], [call["function"] for call in message.get("tool_calls") or ()]]


class Clients:
    def __init__(self, url: str, expected: list[Any]) -> None:
        self._url = url
        self._expected = expected
        self._requests = requests()
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    async def run(self, count: int, seed: int) -> None:
        chosen = random.Random(seed)
        numbers = iter(
            [(chosen.randrange(len(self._requests)), chosen.random(), chosen.random()) for _ in range(count)]
        )

        async def client() -> None:
            async with httpx.AsyncClient(base_url=self._url, timeout=120) as http:
                for number, leaves, when in numbers:
                    await self._one(http, number, when if leaves < LEAVE else None)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def _one(self, http: httpx.AsyncClient, number: int, leaves_at: float | None) -> None:
        kind, path, body = self._requests[number]
        try:
            if leaves_at is not None:
                await self._leave(http, path, body, leaves_at)
                self.counts["left"] += 1
                return
            answer = await http.post(path, json=body)
            outcome = await self._outcome(http, number, answer)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        if outcome in ("right", "degraded", "from afar", "refused", "failed, and said so"):
            self.counts[outcome] += 1
        else:
            self.counts["wrong"] += 1
            self.problems.append(f"{kind}: {outcome}"[:400])

    async def _outcome(self, http: httpx.AsyncClient, number: int, answer: httpx.Response) -> str:
        kind, _, body = self._requests[number]
        if kind == "deferred" and answer.status_code == 202:
            return await self._collected(http, answer.json()["id"], number)
        if answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1:
            return "refused"
        if kind in ("bad", "too long"):
            refused = answer.status_code == 400 and "message" in answer.text
            return "right" if refused else f"{answer.status_code} {answer.text}"
        if kind == "unload":
            return "right" if answer.status_code == 200 else f"{answer.status_code} {answer.text}"
        away = kind.startswith("away")
        if answer.status_code != 200:
            known = away and answer.status_code == 502 and answer.json()["error"]["code"] == "tier_failed"
            return "failed, and said so" if known else f"{answer.status_code} {answer.text}"
        found, right = said(kind, body, answer.text), self._expected[number]
        if not away:
            return "right" if found == right else f"{found!r} for {right!r}"
        if found == {"error": "tier_failed"}:  # it broke off after its first words
            return "failed, and said so"
        tier = answer.headers["x-edge-glm-tier"]
        if tier == "cloud":
            return "from afar" if AWAY in str(found) else f"{found!r} of the cloud"
        return "degraded" if found == right else f"{found!r} for {right!r}"

    async def _collected(self, http: httpx.AsyncClient, id: str, number: int) -> str:
        for _ in range(600):
            answer = await http.get(f"/v1/chat/completions/{id}")
            if answer.status_code == 200 and answer.json()["choices"]:
                found = said("deferred", {}, answer.text)
                right = self._expected[number]
                (await http.delete(f"/v1/chat/completions/{id}")).raise_for_status()
                return "right" if found == right else f"{found!r} for {right!r}"
            await asyncio.sleep(0.1)
        return f"not answered in a minute: {answer.text}"

    async def _leave(self, http: httpx.AsyncClient, path: str, body: dict[str, Any], when: float) -> None:
        async def read() -> None:
            async with http.stream("POST", path, json=body) as answer:
                async for _ in answer.aiter_bytes():
                    pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.05 * when)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def learn(url: str) -> list[Any]:
    """Each alone, one after the other; those that another tier would answer, by the model here."""
    found: list[Any] = []
    with httpx.Client(base_url=url, timeout=120) as http:
        for kind, path, body in requests():
            if kind in ("bad", "too long", "unload"):
                found.append(None)
                continue
            alone = {key: value for key, value in body.items() if key not in ("user", "service_tier")}
            answer = http.post(path, json=alone)
            answer.raise_for_status()
            found.append(said(kind, alone, answer.text))
    return found


def main(url: str, file: Path, count: int | None = None, seed: int = 0) -> None:
    if count is None:
        file.write_text(json.dumps(learn(url)))
        return
    clients = Clients(url, json.loads(file.read_text()))
    asyncio.run(clients.run(count, seed))
    print(json.dumps({"counts": clients.counts, "problems": clients.problems[:20]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5]))
