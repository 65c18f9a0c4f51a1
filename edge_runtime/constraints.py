"""Holds a model to a grammar: before a token is drawn, those that would break the form are ruled out.

By llguidance (Guidance's engine: an Earley parser over lazily built automata, arXiv 2502.05111 compares it). It takes
some 0.05 ms a token, and its limits bound what a grammar made to explode can take.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.tokenizer_json import library_errors

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WHITESPACE = r" |\n{1,2}[ \t]{0,20}"
"""Between the tokens of JSON, as in llama.cpp: enough to indent. In blanks without end small models get lost."""
LEXER_STATES = 20_000
"""Of 1 to 2 kB each."""


class Constraint(Protocol):
    """Of one completion, which it follows."""

    def only(self, logits: NDArray[np.float32], tokens: Sequence[int], prompt_length: int) -> NDArray[np.float32]:
        """A copy of ``logits`` (vocab,) with -inf for all tokens that may not follow on ``tokens``, of which the answer
        begins after ``prompt_length``; at the end of the form that is all but those that end a text. ``logits``
        themselves where all may follow. ``tokens`` begin with those of the last call.

        InvalidRequest where the grammar has become too complex.
        """


class _Held:
    """From the first token on."""

    def __init__(self, matcher: LLMatcher, field: str) -> None:
        self._matcher = matcher
        self._field = field
        self._read = 0

    def only(self, logits: NDArray[np.float32], tokens: Sequence[int], prompt_length: int) -> NDArray[np.float32]:
        for token in tokens[max(self._read, prompt_length) :]:
            self._matcher.consume_token(token)
        self._read = len(tokens)
        return self.allowed(logits)

    def begun(self, tokens: Sequence[int]) -> bool:
        """Whether the form may begin with these; they count then."""
        return bool(self._matcher.try_consume_tokens(list(tokens)) == len(tokens))

    def follow(self, token: int) -> None:
        self._matcher.consume_token(token)

    def allowed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        matcher = self._matcher
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise _refusal(matcher.get_error(), self._field)
        known = min(len(logits), 8 * len(bits))
        allowed = np.unpackbits(bits, count=known, bitorder="little").astype(bool)
        left = np.full_like(logits, -np.inf)
        np.copyto(left[:known], logits[:known], where=allowed)
        return left


class _Late:
    """From an opening on. What comes before it is not looked at by the grammar, and costs nothing."""

    def __init__(self, grammar: Grammar, held: _Held, tokenizer: Tokenizer, opened: LLTokenizer) -> None:
        self._held = held
        self._tokenizer = tokenizer
        self._opened = opened
        self._at_start = grammar.at_start
        self._openings = [text.encode() for text in grammar.openings]
        ids = (tokenizer.token_to_id(text) for text in grammar.openings)
        self._special = {token for token in ids if token is not None and token in tokenizer.special_ids}
        self._text = grammar.begun.encode()
        """Of the answer, as far back as an opening may begin."""
        self._state: Literal["before", "inside", "never"] = "before"
        self._read = 0

    def only(self, logits: NDArray[np.float32], tokens: Sequence[int], prompt_length: int) -> NDArray[np.float32]:
        for token in tokens[max(self._read, prompt_length) :]:
            self._follow(token)
        self._read = len(tokens)
        return self._held.allowed(logits) if self._state == "inside" else logits

    def _follow(self, token: int) -> None:
        if self._state == "inside":
            self._held.follow(token)
        elif self._state == "before" and token in self._special:
            self._state = "inside" if self._held.begun([token]) else "never"
        elif self._state == "before":
            self._text += self._tokenizer.token_bytes(token)
            self._look()

    def _look(self) -> None:
        text = self._text.lstrip() if self._at_start else self._text
        places = [place for each in self._openings if (place := text.find(each)) >= 0]
        if self._at_start and not any(text.startswith(each) or each.startswith(text) for each in self._openings):
            self._state = "never"
        elif places:
            beginning = self._opened.tokenize_bytes(text[min(places) :])
            # a form that the model has left within the token that opened it cannot be held to
            self._state = "inside" if self._held.begun(beginning) else "never"
        elif not self._at_start:
            self._text = text[-max(map(len, self._openings)) :]


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
            raise _refusal(matcher.get_error(), grammar.field)
        held = _Held(matcher, grammar.field)
        if grammar.openings:
            return _Late(grammar, held, self._tokenizer, tokens)
        if grammar.begun and not held.begun(tokens.tokenize_str(grammar.begun)):
            raise InvalidRequest("the answer has begun in another form than the grammar's", "response_format")
        return held

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
                with library_errors(InvalidRequest, "grammars cannot be used with this model's tokenizer"):
                    self._opened = LLTokenizer(self._tokenizer.json, eos_token=list(self._tokenizer.eos_ids))
            return self._opened


def _compiled(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    try:
        if grammar.json:
            schema = grammar.text or '{"type": "object"}'
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    except ValueError as error:
        raise _refusal(str(error), grammar.field) from error
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(grammar.text)


def _refusal(error: str, field: str) -> InvalidRequest:
    return InvalidRequest(f"the answer cannot be held to this grammar: {' '.join(error.split())[:300]}", field)
