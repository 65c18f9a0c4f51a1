"""A folder as onnxruntime-genai's model builder writes it: a graph with GroupQueryAttention, ``genai_config.json``, a
tokenizer. The device layer runs such graphs as they are (:mod:`devices.onnxruntime_genai`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from edge_runtime.errors import CorruptModel, UnsupportedModel
from edge_runtime.package import ArchitectureSummary, Weights
from exporters.foreign.taking import ForeignModel, take
from exporters.hf_text import read_json, read_text_files

CONFIG = "genai_config.json"
_INPUTS = ("input_ids", "attention_mask", "past_key_values.0.key")
_LARGEST_GRAPH = 2**28


def is_genai_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def adopt_genai(folder: Path, target: Path, *, name: str, provenance: Mapping[str, Any]) -> None:
    """Make a package in ``target`` with the graph of ``folder``, byte by byte. UnsupportedModel, CorruptModel,
    StorageError."""
    config = read_json(folder / CONFIG).get("model")
    if not isinstance(config, dict) or not isinstance(config.get("decoder"), dict):
        raise UnsupportedModel(f"{folder / CONFIG} tells of no decoder: only language models are supported")
    path, model = _graph(folder, config)
    text = read_text_files(folder, {key: config.get(key) for key in ("bos_token_id", "eos_token_id")})
    files = [path, *(folder / each for each in _data_files(model))]
    missing = [file.name for file in files if not _is_there(file)]
    if missing:
        raise CorruptModel(f"{folder} lacks {', '.join(missing)}, which its graph names")
    weights = _weights(model)
    found = ForeignModel(
        "onnxruntime-genai",
        f"onnx-{weights}",
        "onnxruntime",
        weights,
        files,
        _architecture(config, model, folder),
        text,
    )
    take(found, folder, target, name=name, provenance=provenance)


def _graph(folder: Path, config: Mapping[str, Any]) -> tuple[Path, onnx.ModelProto]:
    """Its file and itself, without weights."""
    path = folder / Path(str(config["decoder"].get("filename", "model.onnx"))).name
    if not _is_there(path):
        raise CorruptModel(f"{folder} has no {path.name}, which {CONFIG} names")
    if path.stat().st_size > _LARGEST_GRAPH:
        raise UnsupportedModel(f"{path} is too large to be a graph without its weights")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own
        raise CorruptModel(f"{path} is not an ONNX graph: {error}") from error
    missing = [each for each in _INPUTS if each not in {value.name for value in model.graph.input}]
    if missing:
        raise UnsupportedModel(f"{path} takes no {', '.join(missing)}, as language models of that builder do")
    return path, model


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is longer than the system allows
        return False


def _architecture(config: Mapping[str, Any], model: onnx.ModelProto, folder: Path) -> ArchitectureSummary:
    decoder = config["decoder"]
    try:
        return ArchitectureSummary(
            family=str(config.get("type", "unknown")),
            parameters=sum(math.prod(tensor.dims) for tensor in model.graph.initializer),
            num_layers=int(decoder["num_hidden_layers"]),
            num_heads=int(decoder["num_attention_heads"]),
            num_kv_heads=int(decoder["num_key_value_heads"]),
            head_dim=int(decoder["head_size"]),
            hidden_size=int(decoder["hidden_size"]),
            vocab_size=int(config["vocab_size"]),
            max_context=int(config["context_length"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptModel(f"{folder / CONFIG}: {type(error).__name__}: {error}") from error


def _data_files(model: onnx.ModelProto) -> set[str]:
    """Files of weights beside the graph; only names, so that nothing outside its folder is read."""
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return {Path(entry.value).name for entry in entries if entry.key == "location"}


def _weights(model: onnx.ModelProto) -> Weights:
    """By the narrowest of its products' matrices."""
    bits = {
        attribute.i
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    }
    if bits:
        return "int4" if min(bits) <= 4 else "int8"
    kinds = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return "fp16" if onnx.TensorProto.FLOAT16 in kinds else "fp32"
