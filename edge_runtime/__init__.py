"""The runtime: packages, tokenizer, engine, memory, tiers, server and command line.

::

    from edge_runtime import EdgeLLM, SamplingParams

    with EdgeLLM("smollm2:135m") as llm:
        print(llm.generate("Why is the sky blue?", SamplingParams(max_tokens=64)).text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_runtime.answer import Completion
    from edge_runtime.embedder import EdgeEmbedder
    from edge_runtime.errors import EdgeError
    from edge_runtime.grammar import Grammar
    from edge_runtime.llm import EdgeLLM
    from edge_runtime.request import Chunk
    from edge_runtime.sampling import SamplingParams

    __version__: str

__all__ = ["Chunk", "Completion", "EdgeEmbedder", "EdgeError", "EdgeLLM", "Grammar", "SamplingParams", "__version__"]

_WHERE = {
    "Chunk": "edge_runtime.request",
    "Completion": "edge_runtime.answer",
    "EdgeEmbedder": "edge_runtime.embedder",
    "EdgeError": "edge_runtime.errors",
    "EdgeLLM": "edge_runtime.llm",
    "Grammar": "edge_runtime.grammar",
    "SamplingParams": "edge_runtime.sampling",
}


def __getattr__(name: str) -> Any:
    """Import late (PEP 562), so that ``import edge_runtime`` and the command line's help stay quick."""
    if name == "__version__":
        from edge_runtime.version import version

        return version()
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
