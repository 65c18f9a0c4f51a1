"""How much of the memory bandwidth a model's decoding uses: bytes read per token × tokens per second / bandwidth.

    python -m tests.bench.bandwidth PACKAGE [--device edge:cpu]
    python -m tests.bench.bandwidth --watch SECONDS

PACKAGE is a folder with an int4 variant for ONNX Runtime, with our kernels or without, whose file says how large each
matrix is; other engines read as much. The bandwidth is what a thread per core reaches in reading 512 MiB, the median of
several rounds before and after the model, which runs in a process of its own. Run it alone on the machine. ``--watch``
tells how steady that bandwidth is: a virtual machine shares it with others, and no two runs of what lives by it can
agree better.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from edge_runtime.package import Package
from edge_runtime.profiling.limits import read_rates
from tests.bench.peers import last_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, nargs="?", metavar="PACKAGE")
    parser.add_argument("--device", nargs="+", default=["edge:cpu"])
    parser.add_argument("--watch", type=float, metavar="SECONDS")
    args = parser.parse_args()
    if args.watch is not None:
        watch(args.watch)
        return
    if args.package is None:
        parser.error("name a package, or --watch SECONDS")
    read = bytes_per_token(Package.open(args.package))
    print(f"{read / 1e6:.0f} MB of weights are read for a token")
    for device in args.device:
        words = ["bench", args.package, "--device", device, "--prompt-tokens", 128, "--new-tokens", 32]
        before = bandwidth()
        rate = last_json([sys.executable, "-m", "edge_runtime.cli.main", *words, "--no-nll", "--json"])["decode_tps"]
        memory = statistics.median([before, bandwidth()])
        print(f"{device}: {rate:.2f} tokens/s, {read * rate / 1e9:.1f} of {memory / 1e9:.1f} GB/s", end=", ")
        print(f"{read * rate / memory:.0%}")


def bandwidth() -> float:
    """Bytes per second that all cores together read: the median of several rounds."""
    return statistics.median(read_rates())


def watch(seconds: float) -> None:
    """Print how the bandwidth of two seconds at a time spreads."""
    rates, end = [], time.monotonic() + seconds
    while time.monotonic() < end or len(rates) < 3:
        rates.append(bandwidth() / 1e9)
        time.sleep(1)
    low, middle, high = np.percentile(rates, (10, 50, 90))
    print(f"{len(rates)} times: {middle:.1f} GB/s, a tenth below {low:.1f} ({low / middle - 1:+.0%}), ", end="")
    print(f"a tenth above {high:.1f} ({high / middle - 1:+.0%})")


def bytes_per_token(package: Package) -> int:
    """Of all matrices but an embedding that is only looked up in."""
    import onnx

    variant = package.variant("onnxruntime-edge", "int4") or package.variant("onnxruntime", "int4")
    if variant is None:
        raise SystemExit(f"{package.folder} has no int4 variant for ONNX Runtime, which says how large matrices are")
    model = onnx.load(str(package.folder / variant.model), load_external_data=False)
    sizes = {
        tensor.name: int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "length" and not tensor.name.startswith("rope")
    }
    tied = not any(name.startswith("head") for name in sizes)
    return sum(size for name, size in sizes.items() if tied or not name.startswith("embed"))


if __name__ == "__main__":
    main()
