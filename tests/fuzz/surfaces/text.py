"""What a tokenizer, a template and defaults of sampling are for, whatever they come from."""

from __future__ import annotations

from edge_runtime.constraints import Grammars
from edge_runtime.detokenizer import StreamDecoder
from edge_runtime.grammar import Grammar
from edge_runtime.template import ChatTemplate
from edge_runtime.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, é\u3042 <s> #1\n\t there"},
    {"role": "assistant", "content": " Hello "},
    {"role": "user", "content": "Why?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
SCHEMA = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})


def use_tokenizer(tokenizer: Tokenizer) -> None:
    """Text to ids and back, as requests, streams and logprobs need it."""
    text = str(MESSAGES[1]["content"])
    ids = tokenizer.encode(text) + tokenizer.encode(text, parse_special=True)
    tokenizer.encode_framed(text)
    tokenizer.decode(ids)
    stream = StreamDecoder(tokenizer)
    for token in (*ids[:20], 0, 1, tokenizer.vocab_size - 1, tokenizer.vocab_size):
        if token >= 0:
            stream.add(token)
            tokenizer.token_bytes(token)
    stream.flush()


def use_grammar(tokenizer: Tokenizer) -> None:
    """A form held to a model's tokens."""
    import numpy as np

    constraint = Grammars(tokenizer).constraint(SCHEMA)
    constraint.only(np.zeros(max(tokenizer.vocab_size, 1), np.float32), [0], 1)


def use_template(source: str | None, special_tokens: dict[str, str], tokenizer: Tokenizer | None = None) -> None:
    """A conversation as text."""
    if source is None:
        return
    template = ChatTemplate(source, special_tokens)
    rendered = template.render(MESSAGES)
    if tokenizer is not None:
        tokenizer.encode(rendered[:10_000], parse_special=True)
    template.render(MESSAGES[1:2], tools=TOOLS, enable_thinking=False)
