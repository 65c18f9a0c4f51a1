"""Tokenizer, chat template and generation defaults of a Transformers folder.

**BOS rule.** A ``tokenizer.json`` may add the BOS token itself, in its post-processor; other runtimes' flags may add
it too, and then it is there twice. Here a leading BOS is moved out of the post-processor into
``TextFiles.add_bos``, so it can only come from one place. Other tokens of the post-processor (GLM-4's
``[gMASK]<sop>``) stay in it. Without such a post-processor, ``add_bos_token`` of tokenizer_config.json decides.

Truncation and padding stored in ``tokenizer.json`` are dropped: they would silently cut prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edge_runtime.errors import CorruptModel, UnsupportedModel
from edge_runtime.tokenizer_json import open_tokenizer
from exporters.checkpoint import TextFiles

_TOKEN_FIELDS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CorruptModel if it is not one."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if _SURROGATE.search(text):  # JSON may spell halves of a pair, which are no text and cannot be written
            json.dumps(value, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptModel(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptModel(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_text_files(folder: Path, config: Mapping[str, Any]) -> TextFiles:
    """Raises UnsupportedModel without a ``tokenizer.json``, CorruptModel if a file is damaged."""
    if not (folder / "tokenizer.json").is_file():
        raise UnsupportedModel(
            f"{folder} has no tokenizer.json; save the tokenizer once with Transformers' fast tokenizer to get one"
        )
    settings = _optional(folder / "tokenizer_config.json")
    tokens = special_tokens(folder)
    serialized, moved_bos = _without_bos(read_json(folder / "tokenizer.json"), tokens.get("bos_token"))
    tokenizer_json = json.dumps(serialized, ensure_ascii=False)
    try:
        tokenizer = open_tokenizer(tokenizer_json)
    except CorruptModel as error:
        raise CorruptModel(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
    generation = _generation(folder, config, tokenizer, tokens)
    add_bos = moved_bos or (settings.get("add_bos_token") is True and "bos_token" in tokens)
    if add_bos and generation.get("bos_token_id") != tokenizer.token_to_id(tokens["bos_token"]):
        raise CorruptModel(
            f"{folder}: bos_token {tokens['bos_token']!r} is not the token bos_token_id "
            f"({generation.get('bos_token_id')!r}) names"
        )
    return TextFiles(
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(folder, settings),
        special_tokens=tokens,
        add_bos=add_bos,
        generation=generation,
    )


def special_tokens(folder: Path) -> dict[str, str]:
    """Those that the tokenizer's configuration names, as ``cls_token``."""
    settings = _optional(folder / "tokenizer_config.json")
    return _special_tokens({**_optional(folder / "special_tokens_map.json"), **settings})


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names to text; a token is a string or an AddedToken object with ``content``."""
    found = {}
    for name in _TOKEN_FIELDS:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _without_bos(serialized: dict[str, Any], bos: str | None) -> tuple[dict[str, Any], bool]:
    """The tokenizer without truncation, padding and a leading BOS, and whether it had that BOS."""
    processor, moved = _strip_bos(serialized.get("post_processor"), bos)
    return {**serialized, "truncation": None, "padding": None, "post_processor": processor}, moved


def _strip_bos(processor: Any, bos: str | None) -> tuple[Any, bool]:
    if not isinstance(processor, dict) or bos is None:
        return processor, False
    if processor.get("type") == "Sequence":
        parts = [_strip_bos(part, bos) for part in processor.get("processors", [])]
        return {**processor, "processors": [part for part, _ in parts]}, any(moved for _, moved in parts)
    single = processor.get("single")
    if processor.get("type") != "TemplateProcessing" or not isinstance(single, list) or not _leads_with(single, bos):
        return processor, False
    pair = processor.get("pair")
    pair = pair[1:] if isinstance(pair, list) and _leads_with(pair, bos) else pair
    return {**processor, "single": single[1:], "pair": pair}, True


def _leads_with(template: object, token: str) -> bool:
    if not isinstance(template, list) or not template or not isinstance(template[0], dict):
        return False
    special = template[0].get("SpecialToken")
    return isinstance(special, dict) and special.get("id") == token


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """``chat_template.jinja`` goes before tokenizer_config.json, as in Transformers."""
    if (folder / "chat_template.jinja").is_file():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptModel(f"{folder / 'chat_template.jinja'} cannot be read: {error}") from error
    value = settings.get("chat_template")
    if isinstance(value, list):  # several named ones
        named: dict[Any, Any] = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, Mapping)
        }
        if "default" not in named:
            raise UnsupportedModel(f"{folder}: tokenizer_config.json has chat templates {list(named)}, no 'default'")
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise CorruptModel(f"{folder}: chat_template of tokenizer_config.json must be a string")
    return value


def _generation(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, tokens: Mapping[str, str]
) -> dict[str, Any]:
    """generation_config.json, with ids it lacks from config.json, then from the tokenizer."""
    made = {name: value for name, value in _optional(folder / "generation_config.json").items() if value is not None}
    for name in _ID_FIELDS:
        token = tokens.get(name.removesuffix("_id"))
        known = config.get(name) if config.get(name) is not None else token and tokenizer.token_to_id(token)
        if name not in made and known is not None:
            made[name] = known
    eos = made.get("eos_token_id")
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in listed):
        raise CorruptModel(f"{folder}: eos_token_id must be an integer or a list of integers, not {eos!r}")
    return made
