"""The process that :mod:`tests.bench.memory` measures: reads an order, obeys, prints bytes as JSON."""

from __future__ import annotations

import gc
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from edge_runtime import EdgeLLM, SamplingParams
from edge_runtime.heap import return_free_heap
from tests.bench.memory_order import Answer, Order


def obey(order: Order) -> Answer:
    generator = random.Random(1)
    before = after = memory("VmRSS")
    used = 0
    for _ in range(order.rounds):
        llm = EdgeLLM(
            order.package,
            order.device,
            order.budget,
            threads=order.threads,
            prefix_store_bytes=order.prefix_store,
        )
        with llm:
            size = llm.package.manifest.architecture.vocab_size
            params = SamplingParams(temperature=0, max_tokens=order.new_tokens, ignore_eos=True)
            prompts = [[generator.randrange(size) for _ in range(length)] for length in order.prompts]
            with ThreadPoolExecutor(len(prompts)) as pool:
                for answer in pool.map(partial(llm.generate, params=params), prompts):
                    assert len(answer.token_ids) == order.new_tokens
            before, used = after, memory("VmRSS")
        del llm
        gc.collect()
        return_free_heap()
        after = memory("VmRSS")
    return Answer(memory("VmHWM"), before, used, after)


def memory(name: str) -> int:
    """Bytes: ``VmHWM`` is the peak, ``VmRSS`` what is resident now."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.stdout.write(
        "\n" + msgspec.json.encode(obey(msgspec.json.decode(sys.stdin.buffer.read(), type=Order))).decode()
    )
