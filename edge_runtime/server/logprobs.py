"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from edge_runtime.request import Chunk
from edge_runtime.sampling import SamplingParams, TokenLogprob
from edge_runtime.server.served import ServedModel


def shown(chunk: Chunk, model: ServedModel, params: SamplingParams) -> Sequence[TokenLogprob]:
    """The chunk's logprobs without that of the token which ended the completion, which is not part of its text."""
    if chunk.finish_reason not in ("stop", "tool_calls") or not chunk.logprobs:
        return chunk.logprobs
    last = chunk.logprobs[-1].token_id
    ends = last in params.stop_token_ids or (last in model.eos_ids and not params.ignore_eos)
    return chunk.logprobs[:-1] if ends else chunk.logprobs


def chat_logprobs(logprobs: Sequence[TokenLogprob], model: ServedModel) -> dict[str, Any]:
    """``{"content": entries, "refusal": None}``."""
    return {"content": entries_of(logprobs, model), "refusal": None}


def entries_of(logprobs: Sequence[TokenLogprob], model: ServedModel) -> list[dict[str, Any]]:
    """``[{"token", "logprob", "bytes", "top_logprobs"}]``."""
    return [
        _entry(item.token_id, item.logprob, model)
        | {"top_logprobs": [_entry(token, logprob, model) for token, logprob in item.top]}
        for item in logprobs
    ]


def _entry(token_id: int, logprob: float, model: ServedModel) -> dict[str, Any]:
    piece = model.token_bytes(token_id)
    return {"token": piece.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(piece)}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # OpenAI's stand-in for -inf, which JSON does not have


class TextLogprobs:
    """The legacy form: parallel lists. One object per completion, because offsets count on through its chunks."""

    def __init__(self, model: ServedModel, prefix: int = 0) -> None:
        self._model = model
        self._characters = prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def lists(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """``text_offset``: characters of the completion before the token.

        A token that is only a part of a character is written ``bytes:\\xe2\\x82``, as OpenAI does. Tokens of
        ``eos_ids``, sampled under ignore_eos, add no text.
        """
        offsets = []
        for item in logprobs:
            piece = b"" if item.token_id in self._model.eos_ids else self._model.token_bytes(item.token_id)
            if piece and not 0x80 <= piece[0] < 0xC0:  # begins a character: an unfinished one before it ends here
                self._characters += len(self._decoder.decode(b"", final=True))
            offsets.append(self._characters)
            self._characters += len(self._decoder.decode(piece))
        return {
            "tokens": [self._text(item.token_id) for item in logprobs],
            "token_logprobs": [_finite(item.logprob) for item in logprobs],
            # the chosen token is always in, as with OpenAI: up to logprobs + 1 entries
            "top_logprobs": [
                {self._text(token): _finite(logprob) for token, logprob in (*item.top, (item.token_id, item.logprob))}
                for item in logprobs
            ],
            "text_offset": offsets,
        }

    def _text(self, token_id: int) -> str:
        piece = self._model.token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
