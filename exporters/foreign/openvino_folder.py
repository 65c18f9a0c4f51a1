"""A folder as optimum-intel writes it and the OpenVINO hub has it: a stateful graph, Transformers' configuration, a
tokenizer. The device layer runs such graphs as they are (:mod:`devices.openvino_graph`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_runtime.errors import CorruptModel, UnsupportedModel
from edge_runtime.package import Weights
from exporters.architecture import Architecture
from exporters.export import summarize
from exporters.families import architecture
from exporters.foreign.taking import ForeignModel, take
from exporters.hf_text import read_json, read_text_files

GRAPH, WEIGHTS = "openvino_model.xml", "openvino_model.bin"
_OTHERS = ("quantization_config", "transformers_version")
"""Of the configuration: what says nothing of the graph's shapes, or is in the graph already."""
_INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
_LARGEST_XML = 2**28


def is_openvino_folder(folder: Path) -> bool:
    return (folder / GRAPH).is_file()


def adopt_openvino(folder: Path, target: Path, *, name: str, provenance: Mapping[str, Any]) -> None:
    """Make a package in ``target`` with the graph of ``folder``, byte by byte. UnsupportedModel, CorruptModel,
    StorageError."""
    xml = _graph(folder)
    arch = _architecture(folder)
    text = read_text_files(folder, read_json(folder / "config.json"))
    weights = _weights(xml)
    files = [folder / GRAPH, folder / WEIGHTS]
    found = ForeignModel("openvino", f"openvino-{weights}", "openvino", weights, files, summarize(arch), text)
    take(found, folder, target, name=name, provenance=provenance)


def _graph(folder: Path) -> bytes:
    """The XML, once it looks like a language model's."""
    path = folder / GRAPH
    if not (folder / WEIGHTS).is_file():
        raise CorruptModel(f"{folder} has {GRAPH}, but no {WEIGHTS} beside it")
    if path.stat().st_size > _LARGEST_XML:
        raise UnsupportedModel(f"{path} is too large to be a graph without its weights")
    xml = path.read_bytes()
    missing = [each for each in _INPUTS if f'"{each}"'.encode() not in xml]
    if missing or b"ReadValue" not in xml:
        lacks = ", ".join(missing) or "a KV cache of its own"
        raise UnsupportedModel(
            f"{path} is no stateful language model (it lacks {lacks}): export it with optimum-cli, task "
            "text-generation-with-past"
        )
    return xml


def _architecture(folder: Path) -> Architecture:
    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"{folder} has no config.json, which tells heads and layers of {GRAPH}")
    config = read_json(folder / "config.json")
    return architecture({key: value for key, value in config.items() if key not in _OTHERS})


_NARROW: tuple[tuple[Weights, set[bytes]], ...] = (
    ("int4", {b"u4", b"i4", b"nf4"}),
    ("int8", {b"u8", b"i8"}),
    ("fp16", {b"f16", b"bf16"}),
)
"""Formats by types of constants, the narrowest first."""


def _weights(xml: bytes) -> Weights:
    """By the narrowest type of its constants."""
    types = set(re.findall(rb'element_type="(\w+)"', xml))
    return next((weights for weights, names in _NARROW if types & names), "fp32")
