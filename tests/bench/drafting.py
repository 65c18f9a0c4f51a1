"""A model with one that drafts beside itself without, on ordinary text: ``python -m tests.bench.drafting REF DRAFT``.

Both are open at once and asked in turns. Prints the median ratio of decoding rates, how many drafted tokens held, and
whether the answers were the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import closing

from edge_runtime.bench.local import MeasuredLLM
from edge_runtime.evaluation.texts import evaluation_texts
from edge_runtime.sampling import SamplingParams

PROMPT, ANSWER = 96, 128
"""Tokens."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ref")
    parser.add_argument("draft")
    parser.add_argument("--device", default="edge:cpu")
    parser.add_argument("--draft-device", help="default: the same")
    parser.add_argument("--weights")
    parser.add_argument("--prompts", type=int, default=8, help="of each text")
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    common = {"weights": arguments.weights, "prefix_cache_bytes": 0, "prefix_store_bytes": 0}
    params = SamplingParams(temperature=arguments.temperature, seed=1, max_tokens=ANSWER, ignore_eos=True)
    with (
        MeasuredLLM(arguments.ref, arguments.device, **common) as plain,
        MeasuredLLM(
            arguments.ref, arguments.device, draft=arguments.draft, draft_device=arguments.draft_device, **common
        ) as drafting,
    ):
        ratios, rates, same = [], [], []
        for text in evaluation_texts().values():
            ids = plain.tokenizer.encode(text)
            step = (len(ids) - PROMPT) // arguments.prompts
            for start in range(0, step * arguments.prompts, step):
                prompt = ids[start : start + PROMPT]
                (first, slow), (second, fast) = (_answer(each, prompt, params) for each in (plain, drafting))
                ratios.append(fast / slow)
                rates.append((slow, fast))
                same.append(first == second)
        stats = drafting.stats
    slow, fast = (statistics.median(each) for each in zip(*rates, strict=True))
    print(f"{slow:.1f} tok/s without, {fast:.1f} with: {statistics.median(ratios):.2f} (median of {len(ratios)} pairs)")
    print(f"{min(ratios):.2f} to {max(ratios):.2f}; {sum(same)} of {len(same)} answers the same")
    held = stats.accepted_tokens / max(stats.drafted_tokens, 1)
    print(f"{stats.drafted_tokens} tokens drafted, {held:.1%} of them held, {stats.generated_tokens} generated")


def _answer(llm: MeasuredLLM, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
    """The answer, and tokens a second after the first."""
    tokens: list[int] = []
    with closing(llm.stream(prompt, params)) as chunks:
        for chunk in chunks:
            tokens += chunk.token_ids
            if tokens and len(tokens) == len(chunk.token_ids):
                started, begun = time.perf_counter(), len(tokens)
    return tokens, (len(tokens) - begun) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
