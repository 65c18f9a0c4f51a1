"""20,000 mixed requests over one process: ``python -m tests.survive.soak [--requests N] [--html FILE]``.

A server with a model that stays, two that are loaded and unloaded, an encoder, a policy and a tier elsewhere, which
goes away, hangs and comes back all the time. Clients (:mod:`tests.survive.soak_clients`) ask it in rounds: whole,
streamed, several completions, forms, tools, responses, Ollama's API, embeddings, deferred, too long, wrong, and left in
the middle. After each round, once it is quiet, nothing may run or wait, sequences and blocks must add up, and memory is
looked at.

Fails if an answer was wrong or is missing, too few are right or too many refused, something has leaked, or memory has
grown by 2 % since the warm-up.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from edge_runtime import EdgeEmbedder, EdgeLLM
from edge_runtime.bench.page import card, page, tile
from edge_runtime.bench.plots import line
from edge_runtime.engine import TRIM_S
from edge_runtime.exporting import export_package
from edge_runtime.heap import return_free_heap
from edge_runtime.server.app import create_app
from edge_runtime.server.response_store import MOST
from edge_runtime.server.shelf import Offer, Shelf
from tests.exporters.encoder_folder import write_folder
from tests.server.served import running
from tests.survive.soak_clients import AWAY, requests

ROUND = 1000
WARM_UP = 0.25
"""The share of the requests after which memory counts: until then what is kept of them, a bounded number of responses,
traces and prefixes, fills up."""
FILL = MOST
"""Responses that are asked for before all else: so many a server keeps, and the requests themselves would bring the
last of them with the 13,000th only, which looked like a leak of 1 %."""
LEVEL = 3
"""Rounds whose median is a level: heaps come and go by a MiB."""
GROWTH = 0.02
RIGHT, REFUSED = 0.5, 0.05
"""Shares of the requests: at least so many are answered rightly by the model here, at most so many refused for want of
room. (Of 20,000 they were 69 % and none.)"""
POLICY = """
[[tiers]]
name = "local"
kind = "local"

[[tiers]]
name = "cloud"
kind = "openai"
base_url = "{url}"
model = "big"
context = 4096
max_output = 64
retry = {{ attempts = 1 }}
timeouts = {{ connect = 0.5, first_token = 1.0, read = 1.0 }}
breaker = {{ cooldown = 0.5, longest = 1.0 }}

[[classes]]
name = "away"
match = {{ field = {{ user = "away" }} }}
tiers = ["cloud", "local"]
prefer = "remote"
privacy = "any"

[[classes]]
name = "here"
"""


class Elsewhere:
    """Another machine: a process that answers, hangs, breaks off in the middle, or is not there."""

    def __init__(self, seed: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._random = random.Random(seed)
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live)

    def __enter__(self) -> Elsewhere:
        self._start()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._end()

    def _start(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "tests.survive.soak_upstream", str(self.port), AWAY])

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _live(self) -> None:
        """Up for a while, then away or hanging for a while."""
        while not self._over.wait(self._random.uniform(1, 4)):
            if self._random.random() < 0.5:
                self._end()
                self._over.wait(self._random.uniform(0.2, 2))
                self._start()
            else:
                assert self._process is not None
                self._process.send_signal(signal.SIGSTOP)
                self._over.wait(self._random.uniform(0.2, 2))
                self._process.send_signal(signal.SIGCONT)


@contextmanager
def served(folder: Path, elsewhere: int) -> Iterator[tuple[str, EdgeLLM]]:
    """The URL, and the model that stays."""
    for name in "main", "b", "c":
        export_package("synthetic:tiny", folder / name, ["onnxruntime-edge"], "int4")
    write_folder(folder / "files")
    export_package(str(folder / "files"), folder / "encoder", ["onnxruntime"], None)
    policy = folder / "policy.toml"
    policy.write_text(POLICY.format(url=f"http://127.0.0.1:{elsewhere}/v1"))
    with (
        EdgeLLM(str(folder / "main"), "edge:cpu", policy=policy) as llm,
        EdgeEmbedder(str(folder / "encoder"), "onnxruntime:cpu") as encoder,
    ):
        offers = {
            name: Offer(partial(EdgeLLM, str(folder / name), "edge:cpu", prefix_store_bytes=0), llm.facts, 0)
            for name in "bc"
        }
        shelf = Shelf([llm], [encoder], offers, keep_alive=0.5)
        with running(create_app(shelf)) as url:
            yield url, llm
        shelf.close()


def quiet(url: str, llm: EdgeLLM) -> list[str]:
    """What is wrong once nothing is asked any more."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        stats = llm.stats
        open_now = {each["name"] for each in httpx.get(f"{url}/api/ps").json()["models"]}
        if not (stats.running or stats.waiting or open_now & {"b", "c"}):
            break
        time.sleep(0.1)
    else:
        return [f"after a minute there is still something to do: {llm.stats}, open: {open_now}"]
    time.sleep(TRIM_S + 1)
    problems = []
    decoder: Any = llm._loaded.engine._decoder
    try:
        decoder.check_integrity()
    except AssertionError as error:
        problems.append(f"blocks do not add up: {error}")
    if len(decoder._sequences) != llm.stats.cached_sequences:
        problems.append(f"{len(decoder._sequences)} sequences are open, {llm.stats.cached_sequences} are kept prefixes")
    return problems


class Memory:
    """Resident, of this process, all the time."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._course = array("d")  # a list of tuples would itself have grown by half a MiB
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def course(self) -> list[tuple[float, float]]:
        """(minutes, MiB)."""
        return list(zip(self._course[::2], self._course[1::2], strict=True))

    def now(self) -> float:
        """MiB."""
        return float(self._process.memory_info().rss) / 2**20

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self._course.extend(((time.monotonic() - self._started) / 60, self.now()))


def soak(requests: int, seed: int, report: Callable[[str], None]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    problems: list[str] = []
    levels: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder, Elsewhere(seed) as elsewhere, Memory() as memory:
        answers = Path(folder) / "answers.json"
        with served(Path(folder), elsewhere.port) as (url, llm):
            _clients(url, answers)
            _fill(url)
            asked = 0
            while asked < requests:
                count = min(ROUND, requests - asked)
                told = json.loads(_clients(url, answers, count, seed + asked))
                counts.update(told["counts"])
                problems += told["problems"]
                asked += count
                problems += quiet(url, llm)
                gc.collect()
                return_free_heap()
                levels.append((asked, memory.now()))
                report(f"{asked} asked: {dict(counts)}, {levels[-1][1]:.1f} MiB")
    lost = requests - sum(counts.values())
    if lost:
        problems.append(f"{lost} requests are not accounted for")
    problems += uneven(counts, requests)
    counted = [level for asked, level in levels if asked >= WARM_UP * requests]
    growth = statistics.median(counted[-LEVEL:]) / statistics.median(counted[:LEVEL]) - 1
    if growth >= GROWTH:
        problems.append(f"memory has grown by {growth:.1%} since the warm-up")
    return {"requests": requests, "counts": dict(counts), "levels": levels, "growth": growth, "problems": problems,
            "course": memory.course}  # fmt: skip


def _fill(url: str) -> None:
    """The store of responses."""
    bodies = [body for kind, _, body in requests() if kind == "response"]
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(8) as threads:

        def ask(number: int) -> None:
            client.post(f"{url}/v1/responses", json=bodies[number % len(bodies)]).raise_for_status()

        list(threads.map(ask, range(FILL)))


def uneven(counts: Mapping[str, int], requests: int) -> list[str]:
    """What is wrong where each outcome by itself may be: a server that refuses all answers nothing wrongly."""
    problems = []
    if counts.get("right", 0) < RIGHT * requests:
        problems.append(f"only {counts.get('right', 0)} of {requests} requests were answered rightly")
    if counts.get("refused", 0) > REFUSED * requests:
        problems.append(f"{counts['refused']} of {requests} requests were refused")
    return problems


def _clients(url: str, answers: Path, *given: int) -> str:
    command = [sys.executable, "-m", "tests.survive.soak_clients", url, str(answers), *map(str, given)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def html(result: dict[str, Any]) -> str:
    counts = "".join(tile(name, f"{count:,}") for name, count in sorted(result["counts"].items()))
    levels = line(
        [(float(asked), level) for asked, level in result["levels"]], "requests", "MiB", "memory after each round"
    )
    course = line(_thinned(result["course"]), "minutes", "MiB", "memory all the time")
    said = f"{result['requests']:,} requests in one process, memory {result['growth']:+.1%} since the warm-up"
    return page(
        "Soak",
        f"<h1>{said}</h1><div class='tiles'>{counts}</div><div class='plots'>"
        + card("Memory once it was quiet", levels)
        + card("Memory all the time", course)
        + "</div>",
    )


def _thinned(points: Sequence[tuple[float, float]], most: int = 600) -> Sequence[tuple[float, float]]:
    return points[:: max(len(points) // most, 1)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--html", type=Path)
    arguments = parser.parse_args()
    result = soak(arguments.requests, arguments.seed, lambda text: print(text, flush=True))
    if arguments.html is not None:
        arguments.html.write_text(html(result), encoding="utf-8")
    for problem in result["problems"][:20]:
        print(problem)
    print(f"memory {result['growth']:+.2%} since the warm-up; {len(result['problems'])} problems")
    return int(bool(result["problems"]))


if __name__ == "__main__":
    sys.exit(main())
