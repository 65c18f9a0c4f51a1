"""Many malformed inputs: ``python -m tests.fuzz [--inputs 100000] [--seed N] [--only gguf,policy] [--json]``.

Each surface gets its share of the inputs, all made from the seed. An input may be accepted or refused in plain words
(an EdgeError; over HTTP OpenAI's error body). A crash, a hang, another exception, memory without bound, a traceback or
an HTTP 500 is a failure: the input is made small and kept in ``--keep``; ``--replay FILE`` runs it again. Exits with 1
if there was any.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from edge_runtime.columns import columns
from tests.fuzz.campaign import Result, replay, run
from tests.fuzz.surfaces import SURFACES


def shares(names: list[str], inputs: int) -> dict[str, int]:
    """How many of ``inputs`` each of these surfaces gets; what is left over goes to the first."""
    total = sum(surface.weight for surface in SURFACES.values())
    found = {name: inputs * surface.weight // total for name, surface in SURFACES.items()}
    first = next(iter(found))
    found[first] += inputs - sum(found.values())
    return {name: found[name] for name in names}


def table(results: list[Result]) -> str:
    head = ["surface", "inputs", "accepted", "refused", "failures", "worst s", "peak growth MiB", "seconds"]
    rows = [
        [
            each.surface,
            *(f"{number:,}" for number in (each.inputs, each.accepted, each.refused, each.failures)),
            f"{each.worst_seconds:.2f}",
            f"{each.growth / 2**20:.0f}",
            f"{each.seconds:.0f}",
        ]
        for each in results
    ]
    return columns([head, *rows], "lr", head=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--inputs", type=int, default=100_000, help="of all surfaces together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="surfaces, with commas between them; each keeps its share of --inputs")
    parser.add_argument("--time-limit", type=float, help="seconds for each surface, after which no more are begun")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "edge-glm-fuzz")
    parser.add_argument("--replay", type=Path, help="an input that was kept")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        verdict = replay(SURFACES[arguments.replay.parent.name], arguments.replay, arguments.seed)
        print(f"{verdict.kind}: {verdict.detail}")
        return int(verdict.kind == "failed")
    names = list(SURFACES) if arguments.only is None else arguments.only.split(",")
    if unknown := [name for name in names if name not in SURFACES]:
        parser.error(f"there is no surface {', '.join(unknown)}; there are {', '.join(SURFACES)}")
    results = []
    for name, count in shares(names, arguments.inputs).items():
        until = None if arguments.time_limit is None else time.monotonic() + arguments.time_limit
        results.append(run(SURFACES[name], count, arguments.seed, arguments.keep, until))
        print(f"{name}: {results[-1].inputs} inputs, {results[-1].failures} failures", file=sys.stderr)
    if arguments.json:
        print(json.dumps([row(each) for each in results], indent=2))
    else:
        print(table(results))
        for result in results:
            for finding in result.findings.values():
                print(f"{result.surface}: {finding.times} times: {finding.detail}\n    {finding.file}")
    return int(any(each.failures for each in results))


def row(result: Result) -> dict[str, object]:
    return {
        "surface": result.surface,
        "inputs": result.inputs,
        "accepted": result.accepted,
        "refused": result.refused,
        "failures": result.failures,
        "worst_seconds": round(result.worst_seconds, 3),
        "peak_growth_bytes": result.growth,
        "seconds": round(result.seconds, 1),
        "findings": [
            {"what": each.detail, "times": each.times, "file": str(each.file)} for each in result.findings.values()
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
