"""Routing measured end to end: generated tasks through a policy, with an oracle over HTTP in the cloud's place.

``python -m tests.bench.routing PACKAGE [--count 480] [--seed 1] [--device edge:cpu] [--consistency]``

Prints what being judged costs a local answer (times of 128 tokens in 12 interleaved rounds, with a policy that keeps
every answer here after judging it, over those without a policy), then how many answers are right with the local model
alone and under the policy, how many requests went to the oracle (which is always right), and what deciding costs: the
time for class, signals and plan, nothing of which runs the model.
The tasks are of the families that the shipped calibration has not been fitted on, drawn anew by ``--seed``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from edge_runtime import EdgeLLM, SamplingParams
from edge_runtime.prompts import Messages, TierRequest
from edge_runtime.routing.tasks import Task, right, tasks
from tests.tiers.house import LOCAL, cloud, task
from tests.tiers.upstream import Connection, answers, upstream

AT_ONCE = 4
PARAMS = SamplingParams(temperature=0, max_tokens=48)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("package")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--count", type=int, default=480)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--consistency", action="store_true")
    given = parser.parse_args()
    asked = list(tasks("test", given.count, given.seed))
    known = {each.prompt: each.answer for each in asked}

    def oracle(client: Connection) -> None:
        answers(known[client.asked.body["messages"][-1]["content"]])(client)

    with tempfile.TemporaryDirectory() as folder, upstream(oracle) as server:
        os.environ["EDGE_GLM_HOME"] = folder
        policy = Path(folder) / "policy.toml"
        rule = task(consistency=given.consistency, hold={"tokens": 16, "ms": 20000})
        policy.write_text(LOCAL + cloud(server.url, context=8000, max_output=1000) + rule, encoding="utf-8")
        keep = Path(folder) / "keep.toml"
        keep.write_text("[routing]\nthreshold = 0\n" + policy.read_text(encoding="utf-8"), encoding="utf-8")
        found = {"judged": _judged(given.package, given.device, keep)}
        with EdgeLLM(given.package, given.device, policy=policy, prefix_store_bytes=0) as llm:
            print(json.dumps(found | _measure(llm, asked), indent=2))


def _judged(package: str, device: str, policy: Path) -> dict[str, float]:
    """Medians: of the ratio of whole answers, and of the times to the first text."""
    prompt = [{"role": "user", "content": "Write a long story about a meeting room, a clock and a train."}]
    params = SamplingParams(temperature=0, max_tokens=128)

    def timed(llm: EdgeLLM) -> tuple[float, float]:
        started = time.perf_counter()
        chunks = llm.stream(prompt, params)
        next(chunk for chunk in chunks if chunk.text)
        first = time.perf_counter() - started
        for _ in chunks:
            pass
        return first, time.perf_counter() - started

    with EdgeLLM(package, device) as plain, EdgeLLM(package, device, policy=policy) as judged:
        rounds = [(timed(plain), timed(judged)) for _ in range(13)][1:]
    return {
        "whole answers, ratio": float(np.median([after[1] / before[1] for before, after in rounds])),
        "first text, ms": float(np.median([1e3 * after[0] for _, after in rounds])),
        "first text without a policy, ms": float(np.median([1e3 * before[0] for before, _ in rounds])),
    }


def _measure(llm: EdgeLLM, asked: list[Task]) -> dict[str, object]:
    def under_the_policy(each: Task) -> tuple[bool, bool]:
        answer = llm.generate([{"role": "user", "content": each.prompt}], PARAMS)
        return right(answer.text, each.answer), answer.tier != "local"

    def alone(each: Task) -> bool:
        ids = llm.local.prepare(_request(each)).prompt
        with llm.local.start(TierRequest(ids, PARAMS)) as generation:
            return right("".join(chunk.checked().text for chunk in generation), each.answer)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        routed = list(pool.map(under_the_policy, asked))
        local = list(pool.map(alone, asked))
    return {
        "tasks": len(asked),
        "right, local model alone": float(np.mean(local)),
        "right, under the policy": float(np.mean([good for good, _ in routed])),
        "remote share": float(np.mean([remote for _, remote in routed])),
        "decision_ms": _decisions(llm, asked),
    }


def _decisions(llm: EdgeLLM, asked: list[Task]) -> dict[str, float]:
    """Of class, signals, estimate and plan, once the prompt is tokenized; of the tasks, and of whole pages."""
    assert llm.tiers is not None
    regime = llm.tiers.decide(_request(asked[0])).regime
    page = " ".join(each.prompt for each in asked)[:4000]
    found: dict[str, float] = {}
    for name, prompts in {"": [each.prompt for each in asked], "4,000 characters, ": [page] * len(asked)}.items():
        spent = []
        for prompt in prompts:
            request = TierRequest(Messages([{"role": "user", "content": prompt}]), PARAMS)
            prepared = llm.local.prepare(request)
            started = time.perf_counter()
            llm.tiers.weigh(regime, request, prepared)
            spent.append(1e3 * (time.perf_counter() - started))
        found |= {f"{name}p50": float(np.median(spent)), f"{name}p99": float(np.quantile(spent, 0.99))}
    return found


def _request(each: Task) -> TierRequest:
    return TierRequest(Messages([{"role": "user", "content": each.prompt}]), PARAMS)


if __name__ == "__main__":
    main()
