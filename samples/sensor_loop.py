"""Readings of a sensor, summed up in words every minute, within 300 MiB.

``python samples/sensor_loop.py [REF] [--every SECONDS] [--rounds N]``; readings are made up here: put your sensor's in.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterator

from edge_runtime import EdgeLLM, SamplingParams


def readings() -> Iterator[float]:
    """Degrees, one a call."""
    for step in itertools.count():
        yield round(21 + 3 * math.sin(step / 20), 1)


parser = argparse.ArgumentParser()
parser.add_argument("ref", nargs="?", default="smollm2:135m")
parser.add_argument("--every", type=float, default=60)
parser.add_argument("--rounds", type=int, help="default: for ever")
arguments = parser.parse_args()

sensor = readings()
with EdgeLLM(arguments.ref, "cpu", "300MiB", max_sequences=1, prefix_store_bytes=0) as llm:
    for _ in itertools.count() if arguments.rounds is None else range(arguments.rounds):
        until, taken = time.monotonic() + arguments.every, []
        while not taken or time.monotonic() < until:
            taken.append(next(sensor))
            time.sleep(min(1.0, arguments.every / 10))
        told = f"lowest {min(taken)}, highest {max(taken)}, mean {statistics.mean(taken):.1f} degrees"
        question = f"A room's temperature in the last minute: {told}. Say in one sentence how it was."
        print(
            f"[{told}] {llm.generate(question, SamplingParams(temperature=0, max_tokens=40)).text.strip()}", flush=True
        )
