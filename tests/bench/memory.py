"""The footprint that is computed before loading beside the peak that is measured, a line for each device and load.

    python -m tests.bench.memory PACKAGE [--device DEVICE …] [--load LOAD …] [--scale 0.25]

Each line is a process of its own. ``one``: a prompt of 512 tokens; ``many``: 16 prompts of 448 at once; ``mixed``: 16
of 20 to 700; ``budget``: ``many`` under a budget that leaves KV cache for 4,096 tokens; ``reload``: the same again in
one process after the model was closed. Prompts are random tokens, so that every row of the embedding is read.
``--scale`` makes prompts shorter. Linux only: the peak is VmHWM of /proc/self/status.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge_runtime.footprint import Model, Use, footprint
from edge_runtime.package import Package, Variant
from tests.bench.memory_order import NEW, Answer, Order

DEVICES = {"edge:cpu": "onnxruntime-edge", "onnxruntime:cpu": "onnxruntime", "openvino:cpu": "openvino"}
LOADS = ("one", "many", "mixed", "budget", "reload")
STREAMS = 16
TIGHT = 4096
"""Tokens of KV cache under a budget."""
MIB = 1 << 20


class Line(NamedTuple):
    """Bytes."""

    predicted: int
    """Under a budget: the budget."""
    measured: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--device", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--load", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    for device in args.device:
        for load in args.load:
            line = measure(args.package, device, load, args.scale)
            sign = "≤" if load in ("budget", "reload") else "for"
            print(
                f"{device:16} {load:7} measured {line.measured / MIB:7.1f} MiB {sign} {line.predicted / MIB:7.1f} "
                f"({line.ratio - 1:+.1%})",
                flush=True,
            )


def measure(folder: Path, device: str, load: str, scale: float = 1.0) -> Line:
    """In a process of its own."""
    package = Package.open(folder)
    variant = _variant(package, device)
    model = Model.of(package, variant)
    prompts = [max(int(length * scale), 1) for length in _lengths(load)]
    sequences = len(prompts) if load == "one" else STREAMS
    tokens = min(sum(prompts) + NEW * len(prompts), model.architecture.max_context)
    if load in ("budget", "reload"):
        budget = footprint(model, Use(TIGHT)).budget
        order = Order(str(folder), device, prompts, budget=budget, rounds=2 if load == "reload" else 1)
        return Line(budget, run(order).peak)
    return Line(footprint(model, Use(tokens, sequences)).peak, run(Order(str(folder), device, prompts)).peak)


def run(order: Order) -> Answer:
    """What a new process that obeys has found."""
    command = [sys.executable, "-m", "tests.bench.memory_worker"]
    done = subprocess.run(command, input=msgspec.json.encode(order), stdout=subprocess.PIPE, check=True)
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Answer)


def _variant(package: Package, device: str) -> Variant:
    found = next((each for each in package.manifest.variants if each.engine == DEVICES[device]), None)
    if found is None:
        raise SystemExit(f"{package.folder} has no variant for {device}")
    return found


def _lengths(load: str) -> list[int]:
    if load == "one":
        return [512]
    if load == "mixed":
        generator = random.Random(0)
        return [generator.randrange(20, 700) for _ in range(STREAMS)]
    return [448] * STREAMS


if __name__ == "__main__":
    main()
