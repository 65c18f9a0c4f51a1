"""Loss, speed and size of every engine and weight format on the real SmolLM2, in one table.

    python -m tests.bench.fidelity SmolLM2-135M-Instruct.Q4_1.gguf [--weights int4 int8 fp32] [--rounds 3]

Loss is against Transformers in fp32 on the same dequantized weights (tests/fixtures/smollm2). Rates are medians over
rounds in which the engines take turns; run it alone on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from devices import Decoder, DecoderOptions, Step, open_decoder
from devices.base import Engine
from edge_runtime.package import Package
from exporters.export import export
from exporters.formats import open_checkpoint

REFERENCE = Path(__file__).parents[1] / "fixtures" / "smollm2" / "reference.npz"
ENGINES: tuple[Engine, ...] = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Loss:
    """Against the reference: mean negative log-likelihood in nats, and the share of equal next-token choices."""

    nll: float
    reference_nll: float
    top1: float

    @property
    def excess(self) -> float:
        return self.nll / self.reference_nll - 1


def measure_loss(decoder: Decoder) -> Loss:
    with np.load(REFERENCE) as arrays:
        ids, score, top1 = (arrays[name] for name in ("ids", "score", "top1"))
    ids = ids.astype(np.int64)
    logits = all_logits(decoder, ids).astype(np.float64)
    peak = logits.max(-1, keepdims=True)
    log_sum = peak[:, 0] + np.log(np.exp(logits - peak).sum(-1))
    own = logits[np.arange(len(ids) - 1), ids[1:]] - log_sum[:-1]
    return Loss(float(-own.mean()), float(-score.mean(dtype=np.float64)), float((logits.argmax(-1) == top1).mean()))


def all_logits(decoder: Decoder, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits after every token, (len(ids), vocab), in prefill chunks."""
    sequence = decoder.new_sequence(len(ids))
    chunk = decoder.limits.prefill_chunk
    parts = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
    rows = [decoder.forward([Step(sequence, part, rows=len(part))])[0] for part in parts]
    sequence.close()
    return np.concatenate(rows)


def measure_speed(decoder: Decoder, prompt: int = 512, new: int = 48, streams: int = 8) -> dict[str, float]:
    """Tokens per second: prefill of ``prompt`` tokens, decode after it, and decode of ``streams`` at once."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(100, 40000, (streams + 2, prompt))
    rates = {}
    sequences = []
    for index, ids in enumerate(prompts):
        sequence = decoder.new_sequence()
        started = time.perf_counter()
        for start in range(0, prompt, decoder.limits.prefill_chunk):
            decoder.forward([Step(sequence, ids[start : start + decoder.limits.prefill_chunk])])
        if index < 2:  # the first run warms up
            rates["prefill"] = prompt / (time.perf_counter() - started)
            sequence.close()
        else:
            sequences.append(sequence)
    for name, group in (("decode", sequences[:1]), ("streams", sequences)):
        times = []
        for token in range(new):
            batch = [Step(sequence, np.array([5 + token])) for sequence in group]
            started = time.perf_counter()
            decoder.forward(batch)
            times.append(time.perf_counter() - started)
        rates[name] = len(group) / statistics.median(times)
    for sequence in sequences:
        sequence.close()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--weights", nargs="+", default=["int4", "int8", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    losses: dict[tuple[str, str], tuple[Loss, int]] = {}
    rates: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        packages = {}
        for weights in args.weights:
            export(open_checkpoint(args.gguf), Path(folder) / weights, engines=("onnx", "openvino"), weights=weights)
            packages[weights] = Package.open(Path(folder) / weights)
        for round_ in range(args.rounds):
            for weights, package in packages.items():
                for engine in ENGINES:
                    variant = package.variant(engine)
                    if variant is None:
                        raise SystemExit(f"the export has no variant for {engine}")
                    decoder = open_decoder(package.spec(variant), f"{engine}:cpu", DecoderOptions(max_sequences=9))
                    if round_ == 0:
                        losses[engine, weights] = measure_loss(decoder), sum(file.bytes for file in variant.files)
                    rates.setdefault((engine, weights), []).append(measure_speed(decoder))
                    decoder.close()
    print("| engine | weights | NLL | top-1 | MB | prefill 512 | decode at 512 | 8 streams |")
    print("|---|---|---|---|---|---|---|---|")
    for key, (loss, size) in losses.items():
        speed = {name: statistics.median(rate[name] for rate in rates[key]) for name in rates[key][0]}
        print(
            f"| {key[0]} | {key[1]} | {loss.excess:+.2%} | {loss.top1:.1%} | {size / 1e6:.0f} "
            f"| {speed['prefill']:.0f} | {speed['decode']:.0f} | {speed['streams']:.0f} |"
        )


if __name__ == "__main__":
    main()
