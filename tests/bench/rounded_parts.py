"""What it costs a model that comes in 4-bit blocks to have but one part of them smaller, in one table:

    python -m tests.bench.rounded_parts MODEL.gguf

Scales and offsets of the blocks in fewer bits, as shares of the largest of their row, or the embedding in fewer bits,
all of it or rows of rare tokens only (of those that a BPE tokenizer has made last). All else stays as it is: what is
lost comes from that part alone, rounded to nearest. No engine here takes such scales. Bits are those of weights and
scales that are left; zero points of the embedding are not counted.

Everything is computed in numpy, with activations that are not rounded, on the beginnings of the texts that come along.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.columns import columns
from edge_runtime.evaluation.metrics import Tally
from edge_runtime.evaluation.texts import evaluation_texts
from exporters.checkpoint import Checkpoint
from exporters.compression.budget import mean_bits
from exporters.compression.compress import Text, encode
from exporters.compression.quality import compare
from exporters.compression.tensor_folder import ReplacedCheckpoint
from exporters.formats import open_checkpoint
from exporters.network import tensor_names
from exporters.weights import QuantizedTensor, Tensor, dequantize

TOKENS = 513
GROUP = 32
Array = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    source = open_checkpoint(parser.parse_args().model)
    texts = [encode(source, Text(name, text))[:TOKENS] for name, text in evaluation_texts().items()]
    rows = [["part", "bits", "KL", "top-1"]]
    for name, changed, saved in _parts(source):
        judge = Tally()
        for ids in texts:
            compare(ReplacedCheckpoint(source, changed), source, ids, judge)
        found = judge.summary()
        rows.append([name, f"{mean_bits(source) - saved:.2f}", f"{found['kl']:.4f}", f"{found['top1']:.2%}"])
        print(columns(rows, head=True).splitlines()[-1], flush=True)
    print(columns(rows, head=True))


def _parts(source: Checkpoint) -> Iterator[tuple[str, Mapping[str, Tensor], float]]:
    """With the bits a weight, of all weights, that each saves."""
    tensors = {name: source.tensor(name) for name in tensor_names(source.architecture)}
    weights = sum(int(np.prod(each.shape)) for each in tensors.values())
    embedding = dequantize(tensors["embed"])
    narrow = {name: each for name, each in tensors.items() if isinstance(each, QuantizedTensor) and each.bits == 4}
    share = sum(int(np.prod(each.shape)) for each in narrow.values()) / weights
    for bits in (8, 6):
        changed = {name: _with_constants_of(bits, each) for name, each in narrow.items()}
        yield f"scales and offsets of {bits} bits", changed, share * 2 * (16 - bits) / GROUP
    for kept in (0, len(embedding) // 6):
        for bits in (4, 5, 6):
            rounded = _rounded(embedding, bits)
            rounded[:kept] = embedding[:kept]
            name = f"embedding of {bits} bits" + (f" but its first {kept:,} rows" if kept else "")
            yield name, {"embed": rounded}, (8 - bits) * rounded[kept:].size / weights


def _with_constants_of(bits: int, tensor: QuantizedTensor) -> QuantizedTensor:
    steps = np.float32(2**bits - 1)
    unit = np.abs(tensor.scale).max(1, keepdims=True) / steps
    scale = np.maximum(np.rint(np.abs(tensor.scale) / unit), 1) * unit * np.where(tensor.scale < 0, -1, 1)
    offset = tensor.scale * tensor.zero
    low = offset.min(1, keepdims=True)
    step = np.maximum((offset.max(1, keepdims=True) - low) / steps, np.finfo(np.float32).tiny)
    rounded = np.rint((offset - low) / step) * step + low
    return QuantizedTensor(tensor.codes, scale.astype(np.float32), (rounded / scale).astype(np.float32), tensor.bits)


def _rounded(values: Array, bits: int) -> Array:
    """To the nearest of evenly spaced values between the extremes of each group."""
    groups = values.reshape(len(values), -1, GROUP)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    step = np.maximum((high - low) / np.float32(2**bits - 1), np.finfo(np.float32).tiny)
    return np.asarray(np.rint((groups - low) / step) * step + low, np.float32).reshape(values.shape)


if __name__ == "__main__":
    main()
