"""A checkpoint: an architecture, its tensors read one at a time, and the tokenizer's files.

GGUF, safetensors and synthetic models all become one; quantization is ``Checkpoint → Checkpoint``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

from exporters.architecture import Architecture
from exporters.weights import Tensor


@dataclass(frozen=True)
class TextFiles:
    """What turns text into tokens and back, as it goes into the package."""

    tokenizer_json: str
    """The ``tokenizers`` library's serialization."""
    chat_template: str | None = None
    """Jinja source."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """``bos_token``, ``eos_token``, … as templates expect them."""
    add_bos: bool = False
    """Put bos_token before a plain prompt (chat templates bring their own)."""
    generation: dict[str, Any] = field(default_factory=dict)
    """generation_config.json: ``eos_token_id`` (int or list), ``temperature``, ``top_p``, …"""


class Checkpoint(Protocol):
    """Tensors by canonical name; each call reads from the source anew, so only what is held costs memory.

    Names, with shapes of linear weights as (out, in):

    - ``embed`` (vocab, hidden), ``norm`` (hidden,), ``head`` (vocab, hidden) unless ``tied_head``
    - ``layers.{i}.attn_norm``, ``.q``, ``.k``, ``.v``, ``.o``, ``.mlp_norm``, ``.gate``, ``.up``, ``.down``
    - biases, where the architecture has them: ``layers.{i}.q.bias`` and so on
    - ``layers.{i}.q_norm``, ``.k_norm`` (head_dim,) with ``qk_norm``
    - ``layers.{i}.attn_post_norm``, ``.mlp_post_norm`` (hidden,) with ``post_norms``

    Norm weights are the plain factor (Gemma's ``1 + w`` is already added). Rows of ``q`` and ``k`` are in the
    order that ``Rope.interleaved`` says. Fused source tensors (qkv_proj, gate_up_proj) are already split.
    """

    @property
    def architecture(self) -> Architecture: ...

    @property
    def text(self) -> TextFiles: ...

    @property
    def provenance(self) -> dict[str, Any]:
        """Where it came from: ``source``, ``licence`` if known, ``sha256`` of the file(s) if known, ``format``."""

    def tensor(self, name: str) -> Tensor:
        """Read one tensor. KeyError if the architecture has no such tensor; CorruptModel if it is damaged."""


class CheckpointView(ABC):
    """Another's tensors, changed: the frame of a :class:`Checkpoint` over ``base``."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base

    @property
    def architecture(self) -> Architecture:
        return self._base.architecture

    @property
    def text(self) -> TextFiles:
        return self._base.text

    @property
    def provenance(self) -> dict[str, Any]:
        return self._base.provenance

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """See :meth:`Checkpoint.tensor`."""
