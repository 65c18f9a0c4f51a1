"""How much memory a model takes on a device: named parts, computed before anything is loaded.

The peak is ``base + weights``, and beside them the larger of what loading takes for a moment and what running takes.
Each part is an upper bound, but close: ``python -m tests.bench.memory`` holds them to the measured peak, and all
constants come from it (SmolLM2-135M and the shapes of GLM-Edge-1.5B and, for OpenVINO, Llama-1B in int4, onnxruntime
1.32, openvino 2026.4, x86-64 Linux, 2 cores of a Xeon that has AMX; what OpenVINO generates also of an AMD without).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from devices.base import DecoderOptions, Engine
from devices.host import instructions
from devices.kv_types import KVType, KVWish
from edge_runtime.package import ArchitectureSummary, Package, Variant, Weights
from edge_runtime.prefix_store import QUEUED, SEGMENT

MIB = 1 << 20
_SPREAD = 0.09
"""Room in a budget: peaks of the same use differ by up to 6 %, with the order in which requests meet; ONNX Runtime's
most."""


class Model(NamedTuple):
    """What of a variant decides its size."""

    architecture: ArchitectureSummary
    engine: Engine
    weights: Weights
    nbytes: int
    """Of its files."""

    @classmethod
    def of(cls, package: Package, variant: Variant) -> Model:
        return cls(package.manifest.architecture, variant.engine, variant.weights, variant.bytes)


class Use(NamedTuple):
    """What a model is opened for."""

    tokens: int
    """Of KV cache, over all sequences."""
    sequences: int = DecoderOptions.max_sequences
    chunk: int = DecoderOptions.prefill_chunk
    kv_type: KVWish | None = None
    """None: the device's choice."""
    prefix_store: bool = False


class Footprint(NamedTuple):
    """Bytes."""

    base: int
    """Interpreter, tokenizer, engine."""
    weights: int
    """As the engine packs them, and pages of the file that it goes on reading."""
    loading: int
    """Beside them until the model is loaded: what is read and not packed yet."""
    kv: int
    prefix: int
    """Segments on their way to the disk."""
    activations: int

    @property
    def peak(self) -> int:
        return self.base + self.weights + max(self.loading, self.kv + self.prefix + self.activations)

    @property
    def budget(self) -> int:
        """Under which it may be opened: the peak, and by how much peaks differ from run to run."""
        return int(self.peak * (1 + _SPREAD))


class _Costs(NamedTuple):
    """Of an engine, in its own ways."""

    base: int
    """Interpreter and engine, with a model of 0.3 MiB, without its tokenizer."""
    packed: float
    """Bytes in memory for a byte of the file, of matrices of 4 or 8 bits."""
    loose: float
    """The same for matrices of floats."""
    tied: float
    """Bytes more for each value of an embedding that is the head as well: its rows are read from the file's pages. An
    embedding that is not the head is not packed."""
    loading: float
    """Bytes read and not packed yet, for a byte of the file: ONNX Runtime keeps scales and zero points to the end."""
    layer: int
    """What OpenVINO has for each layer beside its matrices."""
    running: int
    """What the first inferences take, whatever the model."""
    streams: int
    """The same for each sequence: OpenVINO generates code for each number of tokens, up to a limit. See
    :func:`_streams`."""
    copies: int
    """Values of the hidden size alive for each token of a step."""
    logits: int
    """Values of the vocabulary's size alive for each sequence."""


_COSTS: dict[Engine, _Costs] = {
    "onnxruntime": _Costs(79 * MIB, 1.15, 2.0, 1.125, 0.24, 0, 2 * MIB, 0, 24, 2),
    # nothing was measured on a Mac: two sessions, each of which may copy the weights
    "onnxruntime-coreml": _Costs(79 * MIB, 2.5, 2.5, 0.0, 0.0, 0, 4 * MIB, 0, 24, 2),
    # the budget is the GPU's memory: a context took 527 MiB, kernels' own the rest (H200, CUDA 13); 1.09 times the file
    # in fp16, and in int4 1.48: matrices are dequantized for long steps
    "onnxruntime-cuda": _Costs(700 * MIB, 1.5, 1.5, 0.0, 0.0, 0, 0, 0, 24, 1),
    # quantized matrices stay in the mapped file; those of floats are ONNX Runtime's
    "onnxruntime-edge": _Costs(75 * MIB, 1.0, 2.0, 0.0, 0.0, 0, 4 * MIB, 0, 12, 1),
    "openvino": _Costs(103 * MIB, 1.37, 3.0, 1.125, 0.0, int(1.6 * MIB), 4 * MIB, 4 * MIB, 24, 2),
    # nothing was measured on an NPU; emulated there is no holding to it, for the CPU has float32 copies
    "openvino-npu": _Costs(103 * MIB, 3.0, 3.0, 0.0, 0.0, 0, 4 * MIB, 0, 24, 1),
}
_VECTORS = frozenset({"AVX-VNNI", "AVX-512"})
_MATRIX_UNIT = "AMX-INT8"
_TOKENIZER = 340
"""Bytes for an entry of the vocabulary: 16 MiB for 49,152 with merges."""
_KV_BLOCK = 32
"""Tokens of a block; a sequence may leave its last one nearly empty."""
_STORE_SEGMENTS = QUEUED + 2
"""Segments of KV cache in memory while the prefix store writes: those waiting, one as it is and one as a file."""
KV_TYPES: dict[Engine, tuple[KVType, ...]] = {
    "onnxruntime": ("float32",),
    "onnxruntime-coreml": ("float16", "float32"),
    "onnxruntime-cuda": ("float16",),
    "onnxruntime-edge": ("float16", "int8"),
    "openvino": ("int8", "float16", "float32"),
    "openvino-npu": ("float16",),
}
"""What a device may keep keys and values as, its own choice first."""


def footprint(model: Model, use: Use, resident: int = 0) -> Footprint:
    """``resident``: what this process has in memory already, engine and tokenizer included; 0: a new process."""
    architecture, costs = model.architecture, _COSTS[model.engine]
    values = architecture.vocab_size * architecture.hidden_size
    per_byte = costs.packed if model.weights in ("int4", "int8") else costs.loose
    rows = int(values * _BYTES_OF_A_ROW[model.weights])
    if architecture.tied_head is False:
        weights, unread = per_byte * (model.nbytes - rows) + rows, rows
    else:
        weights, unread = per_byte * model.nbytes + costs.tied * values, rows // 2
    per_token = kv_bytes_per_token(model, use.kv_type)
    rounded = (-(-use.tokens // _KV_BLOCK) + use.sequences) * _KV_BLOCK
    step = use.chunk + use.sequences
    activations = 4 * (step * architecture.hidden_size * costs.copies)
    activations += 4 * use.sequences * architecture.vocab_size * costs.logits
    return Footprint(
        base=max(costs.base + _TOKENIZER * architecture.vocab_size, resident),
        weights=int(weights) + costs.layer * architecture.num_layers,
        loading=max(int(costs.loading * model.nbytes) - unread, 0),
        kv=rounded * per_token,
        prefix=_STORE_SEGMENTS * SEGMENT * per_token if use.prefix_store else 0,
        activations=activations + costs.running + _streams(costs) * use.sequences,
    )


def _streams(costs: _Costs) -> int:
    return costs.streams // 2 if _generates_less() else costs.streams


@cache
def _generates_less() -> bool:
    """Whether OpenVINO has half as much code and buffers for a number of tokens as with a matrix unit (AMX). So it is
    with AVX-VNNI, AVX-512 and AVX-512 VNNI, and all else that it has differs by 1 % between these; where there is AVX2
    alone nothing was measured, and as much is counted as with AMX."""
    found = set(instructions())
    return bool(found & _VECTORS) and _MATRIX_UNIT not in found


_BYTES_OF_A_ROW: dict[Weights, float] = {"fp32": 4, "fp16": 2, "int8": 1.125, "int4": 1.125}
"""Of each value of an embedding, which has 8 bits in int4 too."""


def kv_bytes_per_token(model: Model, kv_type: KVWish | None) -> int:
    """Over all layers; as the open decoder's limits say it. An NPU has its cache twice: for prompts, and to append."""
    architecture, engine = model.architecture, model.engine
    if kv_type is None or kv_type == "auto":
        kv_type = "float32" if engine == "openvino" and model.weights == "fp32" else KV_TYPES[engine][0]
    dim = architecture.head_dim
    if kv_type != "int8":
        pair = 2 * dim * (4 if kv_type == "float32" or engine == "openvino-npu" else 2)
    elif engine == "openvino":  # a key's channel has a scale and an offset in each block, a value's token has them
        pair = dim * (_KV_BLOCK + 8) // _KV_BLOCK + dim + 8
    else:  # a scale for each token
        pair = 2 * (dim + 4)
    heads = architecture.total_kv_heads
    if engine == "onnxruntime-edge":  # its cache is one tensor
        heads = architecture.num_layers * architecture.num_kv_heads
    return heads * pair


def tokens_within(budget: int, model: Model, use: Use, resident: int = 0) -> int:
    """How many of ``use.tokens`` the budget has room for. Fewer than :func:`tokens_needed`: it cannot work."""
    if footprint(model, use, resident).budget <= budget:
        return use.tokens
    low, high = 0, use.tokens
    while high - low > 1:  # low tokens fit, or are none
        middle = (low + high) // 2
        if footprint(model, use._replace(tokens=middle), resident).budget <= budget:
            low = middle
        else:
            high = middle
    return low


def tokens_needed(model: Model, use: Use) -> int:
    """The least that a model is opened with: a chunk of a prompt."""
    return min(use.chunk, model.architecture.max_context)


def least_budget(model: Model, use: Use, resident: int = 0) -> int:
    """Under which the model can be opened, for whatever short context."""
    return footprint(model, use._replace(tokens=tokens_needed(model, use), prefix_store=False), resident).budget
