"""How families of models write calls of tools, told by their chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CallFormat:
    """Between ``opening`` and ``closing``, with any whitespace beside them: a call, or a list of calls."""

    name: str
    opening: str
    """Text that begins calls; what comes before it in the answer is content."""
    closing: str = ""
    arguments: str = "arguments"
    """The key of a call's arguments; that of its name is ``name``."""
    listed: bool = False
    """Calls are a JSON list; else each has its own opening and closing, if there are any."""
    at_start: bool = False
    """Calls are all of an answer, or none of it."""
    bare_name: bool = False
    """A call is its name, the end of the line and the arguments."""
    id_length: int = 24
    """Characters of an id behind its prefix; templates of Mistral take nine and no prefix."""
    native: bool = True
    """The template speaks of tools by itself."""

    def openings(self, names: Sequence[str]) -> tuple[str, ...]:
        """Texts of which each begins calls."""
        return tuple(f"{name}\n" for name in names) if self.bare_name else (self.opening,)

    @property
    def id_prefix(self) -> str:
        return "" if self.id_length == 9 else "call_"


HERMES = CallFormat("hermes", "<tool_call>", "</tool_call>")
"""Of Nous Research's Hermes, taken on by Qwen, SmolLM and others."""
LLAMA = CallFormat("llama", '{"name":', arguments="parameters", at_start=True)
MISTRAL = CallFormat("mistral", "[TOOL_CALLS]", listed=True, id_length=9)
PHI = CallFormat("phi", "<|tool_call|>", "<|/tool_call|>", listed=True)
GRANITE = CallFormat("granite", "<|tool_call|>", listed=True)
GLM = CallFormat("glm", "", at_start=True, bare_name=True)
PLAIN = CallFormat("plain", HERMES.opening, HERMES.closing, native=False)
"""For templates that do not know of tools: the model is told of them in a system message, in Hermes's way."""


def call_format(template: str | None) -> CallFormat:
    """What the model of this chat template was trained on; :data:`PLAIN` if that cannot be told."""
    source = template or ""
    if "tools" not in source:
        return PLAIN
    if "[TOOL_CALLS]" in source:
        return MISTRAL
    if "<|/tool_call|>" in source:
        return PHI
    if "<|tool_call|>" in source:
        return GRANITE
    if "<|start_header_id|>" in source and '"parameters"' in source:
        return LLAMA
    if "[gMASK]" in source and "<tool_call>" not in source:
        return GLM
    if "<tool_call>" in source and '"arguments"' in source.replace("\\", ""):  # others have XML inside
        return HERMES
    return PLAIN
