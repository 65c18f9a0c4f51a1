"""The process that :mod:`tests.bench.memory` measures: reads an order, obeys, prints its peak in bytes."""

from __future__ import annotations

import random
import re
import sys
import threading
from pathlib import Path

import msgspec

from edge_runtime import EdgeLLM, SamplingParams
from tests.bench.memory_order import Order


def obey(order: Order) -> None:
    generator = random.Random(1)
    for _ in range(order.rounds):
        with EdgeLLM(order.package, order.device, order.budget, prefix_store_bytes=order.prefix_store) as llm:
            size = llm.package.manifest.architecture.vocab_size
            params = SamplingParams(temperature=0, max_tokens=order.new_tokens, ignore_eos=True)
            prompts = [[generator.randrange(size) for _ in range(length)] for length in order.prompts]
            threads = [threading.Thread(target=llm.generate, args=(prompt, params)) for prompt in prompts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


def memory(name: str) -> int:
    """Bytes: ``VmHWM`` is the peak, ``VmRSS`` what is resident now."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    obey(msgspec.json.decode(sys.stdin.buffer.read(), type=Order))
    print(memory("VmHWM"))
