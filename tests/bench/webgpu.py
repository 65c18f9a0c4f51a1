"""Correctness and speed of the WebGPU decoder, on a GPU or on software Vulkan.

    python -m tests.bench.webgpu [--gguf SmolLM2-135M-Instruct.Q4_1.gguf] [--model glm-edge-1.5b] [--weights int4 …]

Needs onnxruntime-ep-webgpu. First a tiny model's logits are compared with the CPU's on the same graph, for steps of
several lengths: the provider has kernels for each. Then rates; weights are random, which changes no time. ``--gguf``:
the loss of that model against Transformers' fp32 logits. ``--no-speed``: only the comparison.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np

from devices import Step
from exporters.formats import open_checkpoint
from exporters.onnx_operators import WeightFormat
from exporters.quantize import QuantizedCheckpoint
from exporters.synthetic import CONFIGS, SyntheticCheckpoint
from tests.bench.cuda import TiledCheckpoint, decode_seconds, open_on, prefill_seconds
from tests.bench.fidelity import TEXTS, all_logits, measure_loss

WEBGPU = "onnxruntime:webgpu"
LENGTHS = (1, 8, 31, 32, 48, 128, 256)
"""Tokens of a step."""


def compare() -> dict[int, float]:
    """Step length → the largest difference of a logit to the CPU's in fp32, as a share of the largest logit."""
    checkpoint = SyntheticCheckpoint("tiny")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        options = {"max_sequences": 2, "prefill_chunk": 256, "kv_tokens": 1024}
        devices = ("onnxruntime:cpu", WEBGPU)
        cpu, gpu = (
            open_on(device, "onnx", checkpoint, "fp32", Path(scratch) / str(index), context=1024, **options)
            for index, device in enumerate(devices)
        )
        rng = np.random.default_rng(0)
        for length in LENGTHS:
            parts = [rng.integers(0, 64, count) for count in (5, length, length)]
            pair = []
            for decoder in (cpu, gpu):
                sequence = decoder.new_sequence()
                pair.append(np.concatenate([decoder.forward([Step(sequence, ids, len(ids))])[0] for ids in parts]))
                sequence.close()
            found[length] = float(np.abs(pair[0] - pair[1]).max() / np.abs(pair[0]).max())
        cpu.close()
        gpu.close()
    return found


def measure_speed(name: str, weights: WeightFormat) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name, "weights": weights}
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        checkpoint = TiledCheckpoint(name, weights, whole=True)
        decoder = open_on(
            WEBGPU,
            "onnx",
            checkpoint,
            weights,
            Path(scratch) / "model",
            context=4096,
            max_sequences=16,
            prefill_chunk=256,
            kv_tokens=16 * 1024,
        )
        row["export_and_load_s"] = round(time.perf_counter() - started, 1)
        for streams in (1, 4, 16):
            step, inside = decode_seconds(decoder, streams)
            row[f"decode_{streams}_tps"] = round(streams / step, 1)
            row[f"decode_{streams}_ms"] = (round(step * 1e3, 3), round(inside * 1e3, 3))
        row["prefill_512_tps"] = round(512 / prefill_seconds(decoder, 512))
        decoder.close()
    return row


def measure_gguf(gguf: Path, weights: WeightFormat) -> dict[str, Any]:
    row: dict[str, Any] = {"model": gguf.name, "weights": weights}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = QuantizedCheckpoint(open_checkpoint(gguf), weights)
        options = {"max_sequences": 2, "prefill_chunk": 256, "kv_tokens": 4096}
        folder = Path(scratch) / "model"
        decoder = open_on(WEBGPU, "onnx", checkpoint, weights, folder, context=4096, **options)
        for text in TEXTS:
            loss = measure_loss(lambda ids: all_logits(decoder, ids), text)
            row[text] = f"{loss.excess:+.3%} {loss.top1:.2%}"
        row["decode_1_tps"] = round(1 / decode_seconds(decoder, 1)[0], 1)
        row["prefill_512_tps"] = round(512 / prefill_seconds(decoder, 512))
        decoder.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--model", default="glm-edge-1.5b", choices=sorted(CONFIGS))
    parser.add_argument("--weights", nargs="*", default=["int4", "fp32"], choices=get_args(WeightFormat))
    parser.add_argument("--no-speed", dest="speed", action="store_false")
    args = parser.parse_args()
    print({length: f"{share:.1e}" for length, share in compare().items()}, flush=True)
    for weights in args.weights if args.gguf is not None else ():
        print(json.dumps(measure_gguf(args.gguf, weights)), flush=True)
    for weights in args.weights if args.speed else ():
        if weights != "fp32":  # of this size 6 GB
            print(json.dumps(measure_speed(args.model, weights)), flush=True)


if __name__ == "__main__":
    main()
