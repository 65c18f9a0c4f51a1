"""How much of a memory budget is left for the KV cache of a model about to be loaded."""

from __future__ import annotations

from devices.base import Engine
from devices.kv_types import KVType, KVWish
from edge_runtime.memory import MemoryBudget
from edge_runtime.package import Package, Variant
from edge_runtime.prefix_store import QUEUED, SEGMENT

MIB = 1 << 20

_BASE: dict[Engine, int] = {
    "onnxruntime": 100 * MIB,
    "onnxruntime-cuda": 700 * MIB,
    "onnxruntime-edge": 100 * MIB,
    "openvino": 140 * MIB,
    "openvino-npu": 140 * MIB,
}
"""Interpreter, engine and its thread pools: 85 and 124 MiB were resident with a model of 0.3 MiB (x86-64 Linux).

On CUDA the budget is the GPU's memory: a context took 527 MiB, kernels' own the rest (H200, CUDA 13).
"""
_WEIGHT_FACTOR: dict[Engine, float] = {
    "onnxruntime": 2.0,
    "onnxruntime-cuda": 1.5,
    "onnxruntime-edge": 2.0,
    "openvino": 3.0,
    "openvino-npu": 3.0,
}
"""The file's mapped pages and the engine's packed copies: 1.6 and 2.95 times the file with SmolLM2-135M int4.

On CUDA with the 1.5B shape 1.09 times in fp16, and in int4 1.48: matrices are dequantized for long steps. On an NPU
nothing was measured. Emulated there is no holding to it: the CPU has float32 copies, 8.7 times the file with int4.
"""
_IN_PLACE = 1.2
"""The same where our own kernels take quantized matrices from the file's pages: 1.05 times with SmolLM2-135M int4.
Matrices of floats are ONNX Runtime's there too."""
_KV_BYTES: dict[Engine, int] = {
    "onnxruntime": 4,
    "onnxruntime-cuda": 2,
    "onnxruntime-edge": 2,
    "openvino": 2,
    "openvino-npu": 4,
}
"""Bytes of one cached value, at most, where the device chooses its type: float32, on CUDA and in our own kernels 16
bits; OpenVINO takes u8, or 16 bits where there is no u8, and for the NPU 16 bits in two places, for reading prompts and
for appending."""
_ACTIVATION_COPIES = 24
"""Hidden-sized float32 vectors alive per token of a prefill chunk: projections, MLP and residuals together."""


_STORE_SEGMENTS = QUEUED + 2
"""Segments of KV cache in memory while the prefix store writes: those waiting, one as it is and one as a file."""


def kv_tokens_within(
    total: int,
    package: Package,
    variant: Variant,
    prefill_chunk: int,
    kv_type: KVWish | None = None,
    *,
    prefix_store: bool = False,
) -> int:
    """Tokens of KV cache that a budget of ``total`` bytes leaves, at most the model's context.

    An estimate from the package alone, on the safe side. BudgetError, naming what would do, if not even one prefill
    chunk would fit.
    """
    arch = package.manifest.architecture
    budget = MemoryBudget(total)
    budget.reserve("base", _BASE[variant.engine])
    budget.reserve("weights", int(variant.bytes * _weight_factor(variant)))
    logits = arch.vocab_size * 4 * 16  # one row for each of the sequences of a batch
    budget.reserve("activations", prefill_chunk * arch.hidden_size * 4 * _ACTIVATION_COPIES + logits)
    of_a_head = arch.head_dim * _KV_BYTES[variant.engine]
    if kv_type is not None and kv_type != "auto":
        of_a_head = _head_bytes(arch.head_dim, kv_type)
    per_token = 2 * arch.num_layers * arch.num_kv_heads * of_a_head
    if prefix_store:
        budget.reserve("prefix", _STORE_SEGMENTS * SEGMENT * per_token)
    at_least = min(prefill_chunk, arch.max_context)
    return budget.kv_tokens_for(per_token, at_least=at_least, at_most=arch.max_context)


def _head_bytes(head_dim: int, kv_type: KVType) -> int:
    """Of the key, or the value, of a token in a head; with 8 bits a scale, and on OpenVINO an offset, of 4 bytes."""
    return {"float32": 4 * head_dim, "float16": 2 * head_dim, "int8": head_dim + 8}[kv_type]


def _weight_factor(variant: Variant) -> float:
    """Bytes in memory for each byte of the files."""
    if variant.engine == "onnxruntime-edge" and variant.weights in ("int4", "int8"):
        return _IN_PLACE
    return _WEIGHT_FACTOR[variant.engine]
