"""Opening an OpenVINO model: read, convert to PagedAttention, gather the wanted rows, compile.

Everything here works on the stateful graphs of :mod:`exporters.openvino_builder` and of optimum-intel alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from devices.base import DecoderOptions, DecoderSpec
from devices.errors import EngineError
from devices.heap import map_large_blocks
from devices.openvino_import import KERNEL_CACHE, import_openvino

ROWS = "logit_rows"
"""Input (rows,) i64: which tokens of the batch get logits."""

_SLIDING_WINDOW_INPUT = 10
_KEY_CACHE_INPUT = 3
_CACHE_INPUT_PREFIX = "key_cache."


@contextmanager
def engine_errors(doing: str) -> Iterator[None]:
    """OpenVINO's exceptions, which are plain RuntimeErrors, become EngineError."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise EngineError(f"OpenVINO failed {doing}: {' '.join(line.strip() for line in reason)[:600]}") from error


def read_model(core: Any, path: Path) -> Any:
    with engine_errors(f"reading {path}"):
        return core.read_model(str(path))


def rope_offset(model: Any, spec: DecoderSpec) -> int:
    """What is added to the positions of sequences on the long factors; 0 when the model has one set."""
    if spec.rope_switch is None:
        return 0
    path = ["edge_glm", "rope_offset"]
    if not model.has_rt_info(path):
        raise EngineError(f"{spec.model} has no edge_glm/rope_offset, which a longrope model needs; export it again")
    return int(model.get_rt_info(path).astype(int))


def precision_defaults(model: Any) -> dict[str, str]:
    """Inference and KV precision for the weights of ``model``.

    Everything is computed in f32: where most of the time goes, products of compressed weights, activations are int8
    either way, and bf16 for the rest gains about a tenth of the prefill time for 1 % of the top-1 tokens
    (SmolLM2 Q4_1, 3,393 tokens: 97.3 % with f32, 96.0 % with bf16). The KV cache is the plugin's choice (8 bit on
    x86: no measurable loss against f16), except that fp32 exports promise fp32 answers.
    """
    path = ["edge_glm", "weights"]
    defaults = {"INFERENCE_PRECISION_HINT": "f32"}
    if model.has_rt_info(path) and model.get_rt_info(path).astype(str) == "fp32":
        defaults["KV_CACHE_PRECISION"] = "f32"
    return defaults


def to_paged_attention(ov: Any, model: Any, spec: DecoderSpec) -> None:
    """Replace cached attention by PagedAttention, with the sliding windows of ``spec``, in place."""
    from openvino._offline_transformations import paged_attention_transformation

    with engine_errors(f"converting {spec.model} to PagedAttention"):
        paged_attention_transformation(model, False, False)
    layers = {}
    for node in model.get_ordered_ops():
        if node.get_type_name().startswith("PagedAttention"):
            name = node.input_value(_KEY_CACHE_INPUT).get_node().get_friendly_name()
            layers[int(name.removeprefix(_CACHE_INPUT_PREFIX))] = node
    if sorted(layers) != list(range(spec.num_layers)):
        raise EngineError(f"{spec.model} has attention layers {sorted(layers)}, not 0..{spec.num_layers - 1}")
    windows = spec.sliding_windows or (None,) * spec.num_layers
    for index, window in enumerate(windows):
        value = ov.op.Constant(ov.Type.i32, ov.Shape([]), [window or 0])  # 0: no window
        layers[index].input(_SLIDING_WINDOW_INPUT).replace_source_output(value.output(0))
    model.validate_nodes_and_infer_types()


def gather_rows(model: Any, axis: int) -> None:
    """Put a Gather of the tokens named by the new input :data:`ROWS` before the vocabulary projection, in place.

    Projecting every token of a 512-token chunk would cost a quarter of its time and 100 MB of logits.
    """
    from openvino import Type
    from openvino import opset13 as ops

    node = model.get_results()[0].input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        if node.get_input_size() == 0:
            raise EngineError("the model's output is not computed by a matrix product over the vocabulary")
        node = node.input_value(0).get_node()
    rows = ops.parameter([-1], Type.i64)
    rows.set_friendly_name(ROWS)
    rows.output(0).get_tensor().set_names({ROWS})
    picked = ops.gather(node.input_value(0), rows, ops.constant(axis, Type.i64))
    node.input(0).replace_source_output(picked.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()


def compile_properties(options: DecoderOptions, defaults: Mapping[str, str]) -> dict[str, str]:
    """For one stream of requests; ``options.properties`` beat ``defaults``."""
    properties = {"PERFORMANCE_HINT": "LATENCY", **defaults}
    if options.threads is not None:
        properties["INFERENCE_NUM_THREADS"] = str(options.threads)
    if options.cache_dir is not None:
        properties["CACHE_DIR"] = str(options.cache_dir)
    return properties | options.properties


def compile_model(core: Any, model: Any, device: str, options: DecoderOptions, defaults: Mapping[str, str]) -> Any:
    """Compile with :func:`compile_properties`."""
    if device == "CPU":
        defaults = {"CPU_RUNTIME_CACHE_CAPACITY": KERNEL_CACHE, **defaults}
    if options.profile is not None:
        defaults = {**defaults, "PERF_COUNT": "YES"}
    properties = compile_properties(options, defaults)
    with engine_errors(f"compiling for {device} with {properties}"):
        return core.compile_model(model, device, properties)


def release_model(compiled: Any) -> None:
    """Give back what a compiled model holds for its requests."""
    with engine_errors("releasing memory"):
        compiled.release_memory()


def new_core() -> tuple[Any, Any]:
    """The module and a fresh ``Core``. EngineError if OpenVINO does not load."""
    try:
        ov = import_openvino()
    except ImportError as error:
        raise EngineError(f"OpenVINO does not load ({error}); pip install openvino") from error
    map_large_blocks()
    return ov, ov.Core()
