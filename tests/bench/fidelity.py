"""Loss, speed and size of every engine and weight format on the real SmolLM2, in one table.

    python -m tests.bench.fidelity FILE.gguf [--weights int4 int8] [--kv-type int8] [--rounds 3] [--npu] [--coreml]

Loss is against Transformers in fp32 on the same dequantized weights (tests/fixtures/smollm2), on the text by which
encodings were chosen and on a held-out one; llama.cpp's too where llama-cpp-python is installed. Rates are medians
over rounds in which the engines take turns; run it alone on the machine. ``--rounds 0``: loss only. ``--kv-type``:
only the devices that have such a KV cache. ``--npu``: also the loss of the NPU's weights, computed by OpenVINO's CPU.
``--coreml``: also that of the graphs for CoreML on ONNX Runtime's CPU provider, on as many tokens as they hold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from devices import Decoder, DecoderOptions, Step, open_decoder
from devices.base import Engine
from devices.errors import DeviceUnavailable
from devices.kv_types import KVType
from edge_runtime.package import Package, Weights
from exporters.export import export
from exporters.formats import open_checkpoint
from exporters.npu_weights import FORMATS

REFERENCES = Path(__file__).parents[1] / "fixtures" / "smollm2"
TEXTS = ("text", "heldout")
RATES = ("prefill", "decode", "streams")
DEVICES: dict[str, Engine] = {
    "edge:cpu": "onnxruntime-edge",
    "onnxruntime:cpu": "onnxruntime",
    "openvino:cpu": "openvino",
}
EXPORTS = ("onnx-edge", "onnx", "openvino")


@dataclass(frozen=True)
class Loss:
    """Against the reference: mean negative log-likelihood in nats, and the share of equal next-token choices."""

    nll: float
    reference_nll: float
    top1: float

    @property
    def excess(self) -> float:
        return self.nll / self.reference_nll - 1


Run = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Token ids → logits after every one of them, (len(ids), vocab)."""


def measure_loss(run: Run, text: str = "text", most: int | None = None) -> Loss:
    """On the first ``most`` tokens of a text, or all."""
    with np.load(REFERENCES / f"{text}.npz") as arrays:
        ids, score, top1 = (arrays[name][:most] for name in ("ids", "score", "top1"))
    score, ids = score[: len(ids) - 1], ids.astype(np.int64)
    logits = run(ids).astype(np.float64)
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


def llama_cpp_logits(gguf: Path) -> Run:
    """The peer on the same file. ImportError when it is not installed."""
    import llama_cpp

    model = llama_cpp.Llama(str(gguf), n_ctx=4096, n_batch=512, logits_all=True, verbose=False)

    def run(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        model.reset()
        model.eval(ids.tolist())
        return np.array(model.scores[: len(ids)], np.float32)

    return run


def static_loss(gguf: Path, engine: str, weights: Weights, folder: Path) -> tuple[list[Loss], int]:
    """Of an export for NPUs or CoreML on both texts, and its size in bytes. The NPU's activations are not rounded."""
    export(open_checkpoint(gguf), folder, engines=[engine], weights=weights)
    package = Package.open(folder)
    (variant,) = package.manifest.variants
    spec, device = package.spec(variant), "onnxruntime:coreml-emulated"
    options = DecoderOptions(max_sequences=1, kv_type="float16")
    if engine == "openvino-npu":
        spec, device = replace(spec, engine="openvino"), "openvino:cpu"
        options = replace(options, properties={"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"})
    decoder = open_decoder(spec, device, options)
    losses = [measure_loss(partial(all_logits, decoder), text, decoder.limits.max_context) for text in TEXTS]
    decoder.close()
    return losses, sum(file.bytes for file in variant.files)


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
    parser.add_argument("--kv-type", choices=get_args(KVType))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--npu", action="store_true")
    parser.add_argument("--coreml", action="store_true")
    args = parser.parse_args()
    losses: dict[tuple[str, str], list[Loss]] = {}
    sizes: dict[tuple[str, str], int] = {}
    rates: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        packages = {}
        for weights in args.weights:
            export(open_checkpoint(args.gguf), Path(folder) / weights, engines=EXPORTS, weights=weights)
            packages[weights] = Package.open(Path(folder) / weights)
        for round_ in range(max(args.rounds, 1)):
            for weights, package in packages.items():
                for device, engine in DEVICES.items():
                    variant = package.variant(engine)
                    if variant is None:
                        raise SystemExit(f"the export has no variant for {engine}")
                    options = DecoderOptions(max_sequences=9, kv_type=args.kv_type)
                    try:
                        decoder = open_decoder(package.spec(variant), device, options)
                    except DeviceUnavailable as error:
                        print(error, file=sys.stderr)
                        continue
                    if round_ == 0:
                        losses[device, weights] = [measure_loss(partial(all_logits, decoder), text) for text in TEXTS]
                        sizes[device, weights] = sum(file.bytes for file in variant.files)
                    if args.rounds:
                        rates.setdefault((device, weights), []).append(measure_speed(decoder))
                    decoder.close()
        static: list[tuple[str, Weights]] = [("openvino-npu", weights) for weights in FORMATS if args.npu]
        for key in [*static, *([("onnx-coreml", "fp16")] if args.coreml else [])]:
            losses[key], sizes[key] = static_loss(args.gguf, *key, Path(folder) / "-".join(key))
    with suppress(ImportError):
        run = llama_cpp_logits(args.gguf)
        losses["llama.cpp", "as it is"] = [measure_loss(run, text) for text in TEXTS]
        sizes["llama.cpp", "as it is"] = args.gguf.stat().st_size
    print("| device | weights | NLL, top-1 on text | on held-out text | MB | prefill 512 | decode at 512 | 8 streams |")
    print("|---|---|---|---|---|---|---|---|")
    for key, both in losses.items():
        measured = rates.get(key, [])
        speed = [f"{statistics.median(rate[name] for rate in measured):.0f}" if measured else "" for name in RATES]
        loss = [f"{each.excess:+.2%}, {each.top1:.1%}" for each in both]
        print(f"| {' | '.join([*key, *loss, f'{sizes[key] / 1e6:.0f}', *speed])} |")


if __name__ == "__main__":
    main()
