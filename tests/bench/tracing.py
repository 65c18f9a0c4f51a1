"""What spans cover of requests' wall time, and what they cost: ``python -m tests.bench.tracing PACKAGE [--device D]``.

Coverage: real requests over HTTP, alone and eight at once, whole and streamed. Cost: what one span takes, times how
many; and the same answers with and without a trace, in turns: the median ratio of pairs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from edge_runtime import EdgeLLM, SamplingParams
from edge_runtime.prompts import Text, TierRequest
from edge_runtime.server.app import create_app
from edge_runtime.tracing.recorder import Recorder
from edge_runtime.tracing.trace import Trace, enter, leave
from tests.server.served import running

QUESTION = "Tell me how a heat pump works, and when it is worth its price. "


def coverage(llm: EdgeLLM) -> list[float]:
    """Of each request."""
    recorder = Recorder()
    with running(create_app(llm, recorder=recorder)) as url, httpx.Client(base_url=url, timeout=120) as client:

        def ask(number: int) -> None:
            body = {
                "model": llm.model_id,
                "messages": [{"role": "user", "content": f"{number}. {QUESTION * (1 + number % 5)}"}],
                "max_tokens": 8 + 8 * (number % 4),
                "stream": bool(number % 2),
                "n": 1 + number % 3 // 2,
            }
            client.post("/v1/chat/completions", json=body).raise_for_status()

        for number in range(20):
            ask(number)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(20, 100)))
    return [trace.covered for trace in recorder.ring.newest(1000)]


def cost(llm: EdgeLLM, streams: int, pairs: int) -> list[float]:
    """Time with traces / without, of pairs that take turns in which comes first."""
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)

    def once(traced: bool) -> float:
        started = time.perf_counter()
        generations = []
        for number in range(streams):
            token = enter(Trace().lane("bench") if traced else None)
            request = llm.local.prepare(TierRequest(Text(f"{number}. {QUESTION}"), params))
            generations.append(llm.local.start(request))
            leave(token)
        for generation in generations:
            for _ in generation:
                pass
        return time.perf_counter() - started

    once(True), once(False)
    ratios = []
    for pair in range(pairs):
        first = once(bool(pair % 2))
        second = once(not pair % 2)
        ratios.append(first / second if pair % 2 else second / first)
    return ratios


def reckoned(llm: EdgeLLM) -> float:
    """What writing the spans of an answer takes, as a share of its wall time: how many there are, times what one takes.
    Other work on the machine does not disturb this one."""
    stream = llm.stream(QUESTION, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    for _ in stream:
        pass
    assert stream.trace is not None
    spans = len(stream.trace)
    lane, many = Trace().lane("bench"), 40_000
    started = time.perf_counter()
    for _ in range(many):
        lane.mark("decode")
    return spans * (time.perf_counter() - started) / many / stream.timing["total"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("package")
    parser.add_argument("--device", default="edge:cpu")
    parser.add_argument("--pairs", type=int, default=20)
    arguments = parser.parse_args()
    with EdgeLLM(arguments.package, arguments.device) as llm:
        covered = coverage(llm)
        least, median = min(covered), statistics.median(covered)
        print(f"{len(covered)} requests: {least:.2%} of the wall time covered at least, {median:.2%} in the median")
        print(f"writing spans: {statistics.median(reckoned(llm) for _ in range(5)):.3%} of an answer's time")
        for streams in (1, 8):
            ratios = cost(llm, streams, arguments.pairs)
            low, middle, high = (each - 1 for each in statistics.quantiles(ratios, n=4))
            told = f"quartiles {low:+.2%}, {high:+.2%}; {len(ratios)} pairs"
            print(f"{streams} streams: {middle:+.2%} time with spans ({told})")
    return int(least < 0.99)


if __name__ == "__main__":
    sys.exit(main())
