"""Models with real shapes and seeded random weights: to size and time a box before downloading anything."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edge_runtime.errors import UnknownReference
from exporters.architecture import Architecture
from exporters.checkpoint import TextFiles
from exporters.families import architecture
from exporters.hf_names import tensor_shape
from exporters.network import tensor_names

_GLM_EDGE = {
    "model_type": "glm",
    "vocab_size": 59264,
    "head_dim": 128,
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "glm-edge-1.5b": {
        **_GLM_EDGE,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "glm-edge-4b": {
        **_GLM_EDGE,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "num_key_value_heads": 6,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}
"""``config.json`` of each model, as its makers publish the shapes."""

_SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class SyntheticCheckpoint:
    """``name`` is one of :data:`CONFIGS`; UnknownReference otherwise.

    Each tensor is drawn from a seed made of the model's and its own name: the same on every machine with the same
    numpy, in any order of reading.
    """

    def __init__(self, name: str) -> None:
        if name not in CONFIGS:
            raise UnknownReference(f"there is no synthetic model {name!r}; there are: {', '.join(CONFIGS)}")
        self._name = name
        self._architecture = architecture(CONFIGS[name])
        self._names = frozenset(tensor_names(self._architecture))

    @property
    def architecture(self) -> Architecture:
        return self._architecture

    @cached_property
    def text(self) -> TextFiles:
        first_special = self._architecture.vocab_size - len(_SPECIAL)
        ids = {token: first_special + index for index, token in enumerate(_SPECIAL)}
        return TextFiles(
            tokenizer_json=_tokenizer(self._architecture.vocab_size).to_str(),
            chat_template=_TEMPLATE,
            special_tokens={"eos_token": _SPECIAL[0], "pad_token": _SPECIAL[0]},
            generation={"eos_token_id": [ids["<|endoftext|>"], ids["<|user|>"]], "pad_token_id": ids["<|endoftext|>"]},
        )

    @property
    def provenance(self) -> dict[str, Any]:
        return {"source": f"synthetic:{self._name}", "format": "synthetic", "licence": "CC0-1.0"}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Norms are 1 give or take; matrices are scaled by their inputs, so that activations keep their size."""
        if name not in self._names:
            raise KeyError(name)
        shape = tensor_shape(self._architecture, name)
        seed = hashlib.sha256(f"{self._name}/{name}".encode()).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(seed[:16], "little")))
        values = generator.standard_normal(shape, np.float32)
        if len(shape) == 1:
            values *= np.float32(0.1)
            return values + np.float32(1.0 if name.endswith("norm") else 0.0)
        gain = 3.0 if name in ("embed", "head") else 1.0  # logits with a clear winner
        values *= np.float32(gain / shape[1] ** 0.5)
        return values


def _tokenizer(vocab_size: int) -> Tokenizer:
    """One token per byte, then fillers that no text encodes to but every id decodes from, then the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"Ġt{index}" for index in range(len(letters), vocab_size - len(_SPECIAL))]
    vocab = {token: index for index, token in enumerate([*letters, *fillers, *_SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return tokenizer
