"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import msgspec

from edge_runtime.errors import InvalidRequest
from edge_runtime.server.wire.messages import Message, check_messages


class TokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Text, or messages, which go through the chat template."""

    model: str | None = None
    """None: the only one that there is."""
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    """Of text: the token that begins one, if the model wants that."""
    return_token_strs: bool = False

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("send either a prompt or messages", "prompt")
        if self.messages is not None:
            check_messages(self.messages)


class DetokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    tokens: list[int]

    def check(self) -> None:
        for token in self.tokens:
            if not 0 <= token < 2**31:
                raise InvalidRequest(f"tokens: {token} is not a token id", "tokens")
