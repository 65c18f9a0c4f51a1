"""Processes that do for a while what a server does to its stores: ``python -m tests.survive.workers NAME``.

Each runs in the working folder of a box and goes on from what is there. A line on stdout says what is done, once it is:
what was said must be there after a kill. Errors are told as the command line tells them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from unittest import mock

import msgspec

from edge_runtime import EdgeLLM, SamplingParams
from edge_runtime.bench.job import Job
from edge_runtime.deferred.answers import Choice, Done, unpack
from edge_runtime.deferred.deferrals import Deferrals
from edge_runtime.egress.ledger import Ledger, Sending, Settlement
from edge_runtime.errors import EdgeError, ModelNotFound, PolicyError
from edge_runtime.fetch import Fetched
from edge_runtime.keys import KeyRing
from edge_runtime.package import storage_errors
from edge_runtime.paths import home
from edge_runtime.policy.rules import Deferred, Policy
from edge_runtime.prompts import NOTHING, Messages, TierRequest
from edge_runtime.routing.dispatcher import Dispatcher
from edge_runtime.store import Store
from edge_runtime.tuning import run as tuning
from edge_runtime.tuning import search
from edge_runtime.tuning.log import TuningLog
from edge_runtime.tuning.records import Run
from tests.tiers.house import GREEDY, QUESTION, FakeLocal

DOOMED = "hf:somebody/doomed"
"""A model that is removed."""
SENDINGS = 10
"""Of each of two threads."""
DEFERRED = 10
PROMPTS = tuple(f"{number} " + "The pump hums at night. " * 28 for number in range(3))
"""Of 600 tokens and more: two whole segments each."""
VERSIONS = 4
"""Of the policy, one after the other."""
_BLOCK = 4096
"""Editors write their buffers, one after the other."""


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


# --- models -----------------------------------------------------------------------------------------------------------


def adopt() -> None:
    """A package that somebody else has made, as the hub brings it."""

    def fetched(reference: object, workdir: Path, progress: object) -> Fetched:
        return Fetched(Path("../../package"), {})

    with mock.patch("edge_runtime.store.fetch", fetched):
        Store(home()).ensure("hf:somebody/tiny", "onnxruntime")
    say("adopted")


def remove() -> None:
    """One of two models, if it is still there."""
    with suppress(ModelNotFound):
        Store(home()).remove(DOOMED)
    say("removed")


# --- tuning -----------------------------------------------------------------------------------------------------------


def tune() -> None:
    """One round of one lever, whatever the machine does beside: so it is short, and no clock decides."""
    job = Job(ref="model", device="edge:cpu", prompt_tokens=8, new_tokens=8)
    short = mock.patch.multiple(search, _ROUNDS=1, levers=lambda scope: ("threads",))
    with short, mock.patch.multiple(tuning, TuningLog=_SayingLog, TIMED_FROM_S=math.inf):
        found = tuning.tune(job, limit_s=600)
    say(f"ended with {len(found.trials)}")


class _SayingLog(TuningLog):
    def keep(self, run: Run) -> None:
        super().keep(run)
        say(f"kept {run.started} {len(run.trials)}")


# --- the ledger -------------------------------------------------------------------------------------------------------


def ledger() -> None:
    """Two threads with a ledger each; what an earlier run sent and did not settle is settled first."""
    threads = [threading.Thread(target=_reporting, args=(_send_all, name)) for name in "ab"]
    with closing(Ledger(home().ledger)) as opened:
        rows = list(opened.rows())
        settled = {row["settles"] for row in rows if row["event"] == "settled"}
        for row in rows:
            if row["event"] == "sent" and row["seq"] not in settled:
                opened.settle(row["seq"], Settlement(0, None, None, None, "nobody knows"))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _send_all(name: str) -> None:
    with closing(Ledger(home().ledger)) as opened:
        known = {row["request"] for row in opened.rows()}
        for request in (f"{name}{number}" for number in range(SENDINGS)):
            if request not in known:
                seq = opened.send(Sending(request, 1, "cloud", "all", b"{}", 5, keep_content=True))
                say(f"sent {request}")
                opened.settle(seq, Settlement(2, 1, 1, 3, "answered"))
                say(f"settled {request}")


# --- deferred requests ------------------------------------------------------------------------------------------------


def deferred() -> None:
    """As a server with a client that asks again for what it was given no id of."""
    logging.getLogger("edge_glm.deferred").addHandler(_Restarted())
    asyncio.run(_defer())


class _Restarted(logging.Handler):
    """The service is ended when it says that it waits for its disk, and started again later."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"edge-glm: {record.getMessage()}", file=sys.stderr, flush=True)
        os._exit(1)


async def _defer() -> None:
    async def answer(name: str, request: TierRequest) -> Done:
        say(f"asked {name} {number_of(request)}")
        await asyncio.sleep(0.001)
        return Done([Choice(f"answer {number_of(request)}", "stop")], 3, 2, "cloud", {})

    deferrals = Deferrals(home().deferred, asyncio.get_running_loop(), answer, Deferred)
    known = {number for number, _ in queued()}
    for number in range(DEFERRED):
        if number not in known:
            request = TierRequest(Messages([{"role": "user", "content": str(number)}]), GREEDY, NOTHING)
            say(f"took {await asyncio.to_thread(deferrals.add, request)} {number}")
    while any(state in ("queued", "running") for _, state in queued()):
        await asyncio.sleep(0.005)
    deferrals.close()


def number_of(request: TierRequest) -> int:
    assert isinstance(request.prompt, Messages)
    return int(request.prompt.messages[0]["content"])


def queued() -> list[tuple[int, str]]:
    """Number and state of all requests."""
    from edge_runtime.deferred.queue import Queue

    with closing(Queue(home().deferred)) as queue:
        return [(number_of(unpack(entry.body)), entry.state) for entry in queue.entries()]


# --- prefixes ---------------------------------------------------------------------------------------------------------


def prefixes() -> None:
    """Long prompts, each twice, by the model ``model`` of the working folder."""
    with EdgeLLM("model", device="edge:cpu") as llm:
        for prompt in (*PROMPTS, *PROMPTS):
            answer = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=4, logprobs=1))
            assert answer.logprobs is not None
            likely = " ".join(f"{each.logprob:.3f}" for each in answer.logprobs)
            say(f"{PROMPTS.index(prompt)} {answer.token_ids} {likely}")


# --- configuration ----------------------------------------------------------------------------------------------------


def policy(version: int) -> str:
    """Of two blocks and a bit. Its last class says what a version may send away: cut off it would send everything."""
    secrets = "".join(
        f'[[classes]]\nname = "secret{number}"\nmatch.keywords = ["version {version}, number {number:04}"]\n'
        for number in range(110)
    )
    return (
        'ends_with = "# end"\n'
        '[[tiers]]\nname = "local"\nkind = "local"\n'
        f'[[tiers]]\nname = "cloud"\nkind = "openai"\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "v{version}"\n'
        f"context = 1000\nmax_output = 100\n{secrets}"
        f'[[classes]]\nname = "public"\nprivacy = "any"\nmatch.regex = "^public{version}:"\n# end\n'
    )


def config() -> None:
    """A server that obeys a policy while an editor writes it in place, and keys come."""
    file = Path("policy.toml")
    _edit(file, policy(0))
    local = FakeLocal()
    wholes = whole_policies()
    try:
        with closing(Dispatcher(file, local, _no_other, home(), offline=True)) as server:
            editor = threading.Thread(target=_reporting, args=(_edit_all, file))
            editor.start()
            while True:
                alive = editor.is_alive()
                decision = server.decide(TierRequest(Messages(QUESTION), GREEDY, NOTHING))
                if decision.regime.policy not in wholes:
                    say("obeyed half a policy")
                if not alive:
                    break
            say(f"obeys {wholes.index(decision.regime.policy)}")
    finally:
        local.close()


def whole_policies() -> list[Policy]:
    """The policies that there are."""
    return [msgspec.convert(tomllib.loads(policy(version)), Policy) for version in range(VERSIONS)]


def _edit_all(file: Path) -> None:
    ring = KeyRing(home().keys)
    for version in range(VERSIONS):
        _edit(file, policy(version))
        if all(key.name != f"key{version}" for key in ring.keys):
            ring.add(f"key{version}")
        say(f"added key{version}")


def _edit(file: Path, text: str) -> None:
    data = text.encode()
    with storage_errors(f"cannot write {file.absolute()}"), file.open("wb") as opened:
        for start in range(0, len(data), _BLOCK):
            opened.write(data[start : start + _BLOCK])
            opened.flush()


def _no_other(tier: object) -> FakeLocal:
    raise PolicyError("there is no other model here")


# --- all --------------------------------------------------------------------------------------------------------------

WORKERS: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (adopt, remove, tune, ledger, deferred, prefixes, config)
}


@contextmanager
def _told() -> Iterator[list[int]]:
    codes = [0]
    try:
        yield codes
    except EdgeError as error:
        print(f"edge-glm: {error}", file=sys.stderr)
        codes[0] = 1


def _reporting(work: Callable[..., None], *given: object) -> None:
    """In a thread: a failure ends the process."""
    with _told() as codes:
        work(*given)
    if codes[0]:
        os._exit(codes[0])


def main(names: Iterable[str]) -> int:
    with _told() as codes:
        for name in names:
            WORKERS[name]()
    return codes[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
