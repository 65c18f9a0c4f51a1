"""What a model's files are for, whichever way they are written."""

from __future__ import annotations

import shutil
from pathlib import Path

from edge_runtime.tokenizer import Tokenizer
from exporters.export import eos_ids
from exporters.formats import open_checkpoint
from exporters.network import tensor_names
from exporters.weights import dequantize
from tests.fuzz.surface import command
from tests.fuzz.surfaces.text import use_template, use_tokenizer


def use_checkpoint(path: Path) -> None:
    """All of it, piece by piece."""
    checkpoint = open_checkpoint(path)
    for name in tensor_names(checkpoint.architecture):
        dequantize(checkpoint.tensor(name))
    _ = checkpoint.provenance
    text = checkpoint.text
    tokenizer = Tokenizer(text.tokenizer_json, eos_ids=eos_ids(text))
    use_tokenizer(tokenizer)
    use_template(text.chat_template, text.special_tokens, tokenizer)


def command_checkpoint(path: Path, out: Path) -> None:
    """By the commands that take one. ``out``: a folder that is there only meanwhile."""
    command("export", str(path), "-o", str(out), "--engine", "onnx", "--weights", "int4")
    command("plan", str(path))
    shutil.rmtree(out, ignore_errors=True)
