"""Holds a model to a grammar: before a token is drawn, those that would break the form are ruled out.

By llguidance (Guidance's engine: an Earley parser over lazily built automata, arXiv 2502.05111 compares it). It takes
some 0.05 ms a token, and its limits bound what a grammar made to explode can take.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WHITESPACE = r" |\n{1,2}[ \t]{0,20}"
"""Between the tokens of JSON, as in llama.cpp: enough to indent. In blanks without end small models get lost."""
LEXER_STATES = 20_000
"""Of 1 to 2 kB each."""


class Constraint:
    """Of one completion, which it follows."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._read = 0

    def only(self, logits: NDArray[np.float32], tokens: Sequence[int], prompt_length: int) -> NDArray[np.float32]:
        """A copy of ``logits`` (vocab,) with -inf for all tokens that may not follow on ``tokens``, of which the answer
        begins after ``prompt_length``; at the end of the form that is all but those that end a text. ``tokens`` begin
        with those of the last call.

        InvalidRequest where the grammar has become too complex.
        """
        matcher = self._matcher
        for token in tokens[max(self._read, prompt_length) :]:
            matcher.consume_token(token)
        self._read = len(tokens)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        known = min(len(logits), 8 * len(bits))
        allowed = np.unpackbits(bits, count=known, bitorder="little").astype(bool)
        left = np.full_like(logits, -np.inf)
        np.copyto(left[:known], logits[:known], where=allowed)
        return left


class Grammars:
    """Grammars over a model's tokens. Thread safe. What it takes (0.5 s, 17 MiB for 49,000 tokens) it takes with the
    first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._opened: LLTokenizer | None = None

    def constraint(self, grammar: Grammar) -> Constraint:
        """InvalidRequest if no answer of this model could be held to it."""
        from llguidance import LLMatcher, LLParserLimits  # late: few need it

        tokens = self._open()
        limits = LLParserLimits(max_lexer_states=LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(tokens, _compiled(grammar), log_level=0, limits=limits)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        if grammar.begun:
            begun = tokens.tokenize_str(grammar.begun)
            if matcher.try_consume_tokens(begun) < len(begun):
                raise InvalidRequest("the answer has begun in another form than the grammar's", "response_format")
        return Constraint(matcher)

    def refusal(self, grammar: Grammar) -> str | None:
        """Why no answer can be held to it; None: it can."""
        try:
            self.constraint(grammar)
        except InvalidRequest as error:
            return str(error)
        return None

    def _open(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._lock:
            if self._opened is None:
                if not self._tokenizer.eos_ids:
                    raise InvalidRequest("this model has no token that ends a text, which a grammar needs")
                try:
                    self._opened = LLTokenizer(self._tokenizer.json, eos_token=list(self._tokenizer.eos_ids))
                except Exception as error:  # the library raises bare ValueError and RuntimeError
                    raise InvalidRequest(f"grammars cannot be used with this model's tokenizer: {error}") from error
            return self._opened


def _compiled(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    try:
        if grammar.json:
            schema = grammar.text or '{"type": "object"}'
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    except ValueError as error:
        raise _refusal(str(error)) from error
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(grammar.text)


def _refusal(error: str) -> InvalidRequest:
    return InvalidRequest(
        f"the answer cannot be held to this grammar: {' '.join(error.split())[:300]}", "response_format"
    )
