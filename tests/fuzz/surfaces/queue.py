"""The queue of deferred requests, damaged: what is whole in it is found and answered all the same."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing, suppress
from typing import Any

import msgspec

from edge_runtime.deferred.answers import Choice, Done, Failed, pack, unpack
from edge_runtime.deferred.deferrals import ticket
from edge_runtime.deferred.queue import PREFIX, Queue
from edge_runtime.errors import EdgeError
from edge_runtime.grammar import Grammar
from edge_runtime.policy.rules import Deferred
from edge_runtime.prompts import About, Messages, TierRequest
from edge_runtime.sampling import SamplingParams
from tests.fuzz.database import BYTES, ROWS, Database, anything
from tests.fuzz.mutation import as_json, disturb
from tests.fuzz.surface import Case, Failure, Surface, command, sometimes

NOW = 1_800_000_000.0
BOUNDS = Deferred()
ABOUT = About({"x-task": "y"}, {"a": "b"}, {"service_tier": "flex"}, {"tools": [{"type": "function"}]})
BODIES = [
    pack(TierRequest(Messages([{"role": "user", "content": f"what is {number}?"}]), params, ABOUT))
    for number, params in enumerate(
        [SamplingParams(temperature=0.5, stop=("a",), logit_bias={5: 1.5}), SamplingParams(grammar=Grammar.regex("a+"))]
        * 4
    )
]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DONE = msgspec.json.encode(Done([Choice("five", "stop", [CALL])], 3, 2, "cloud", {"x-edge-glm-tier": "cloud"}))
FAILED = msgspec.json.encode(Failed("it was refused", 400))


class Queues(Surface):
    name = "queue"
    weight = 4

    def prepare(self) -> list[Case]:
        self._path = self.folder / "home" / "deferred.sqlite"
        self._queue().close()
        states = [("queued", None), ("running", None), ("done", DONE), ("failed", FAILED)] * 2
        with closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
            connection.execute("INSERT INTO clock VALUES (1, 'fuzz', ?)", (NOW - 500,))
            for number, (body, (state, result)) in enumerate(zip(BODIES, states, strict=True)):
                created = NOW - 100 + number
                connection.execute(
                    "INSERT INTO requests VALUES (?, ?, ?, 1, ?, 'it is offline', ?, ?)",
                    (f"{PREFIX}{number:032x}", created, state, created, body, result),
                )
        self._database = Database(self._path, "requests")
        return [Case(BYTES, self._database.valid), Case(ROWS, self._database.valid)]

    def make(self, rng: random.Random) -> Case:
        def disturbed(column: str, value: Any) -> Any:
            if column in ("body", "result") and value is not None and rng.random() < 0.8:
                return as_json(rng, disturb(rng, json.loads(value), self.made(rng)))
            return anything(rng)

        return self._database.made(rng, disturbed)

    def run(self, case: Case) -> None:
        self._database.put(case.data)
        whole: dict[str, tuple[bytes, bytes]] = {}
        if case.name == ROWS:  # a damaged index may hide any
            rows = self._database.read()
            whole = {row[0].decode(): (row[6], row[2]) for row in rows if row in self._database.rows}
            # whose id another row has taken over is not found by it
            whole = {name: each for name, each in whole.items() if [row[0] for row in rows].count(name.encode()) == 1}
        try:
            with closing(self._queue()) as queue:
                self._use(queue, whole)
        except EdgeError as error:
            if case.name == ROWS:
                raise Failure(f"a damaged row stops the queue: {error}") from error
            raise
        self._database.put(case.data)
        if sometimes(case, 8):
            command("deferred", "--json")
            command("deferred")

    def _use(self, queue: Queue, whole: dict[str, tuple[bytes, bytes]]) -> None:
        entries = {entry.id: entry for entry in queue.entries()}
        for name, (body, state) in whole.items():
            if name not in entries or (entries[name].body, entries[name].state.encode()) != (body, state):
                raise Failure("a whole row is hidden by a damaged one")
        for entry in entries.values():
            ticket(entry)
        queue.put_back()
        mine = queue.add(BODIES[0], BOUNDS)
        taken = []
        while (found := queue.take(BOUNDS)) is not None:
            taken.append(found.id)
            with suppress(EdgeError):
                unpack(found.body)
            queue.finish(found.id, "done", DONE)
            if len(taken) > len(entries) + 1:
                raise Failure("a request is taken for ever")
        waiting = {name for name, (_, state) in whole.items() if state in (b"queued", b"running")}
        if missing := waiting - set(taken):
            raise Failure(f"{len(missing)} whole requests are not taken")
        for name, body in ({name: body for name, (body, _) in whole.items()} | {mine: BODIES[0]}).items():
            kept = queue.get(name)
            if kept is None or kept.body != body:
                raise Failure("a request that was just put in is lost" if name == mine else "a whole request is lost")
        if not queue.remove(mine) or queue.get(mine) is not None:
            raise Failure("a request is not removed")

    def _queue(self) -> Queue:
        return Queue(self._path, lambda: NOW, lambda: 500.0, "fuzz")
