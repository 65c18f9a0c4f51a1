"""Tools for one model: its prompt, the form of its answer, and how that is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from edge_runtime.detokenizer import Decoding, TokenText
from edge_runtime.errors import InvalidRequest
from edge_runtime.prompts import Messages, TierRequest
from edge_runtime.sampling import SamplingParams
from edge_runtime.template import ChatTemplate
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.tools.call_grammar import call_grammar
from edge_runtime.tools.formats import call_format
from edge_runtime.tools.prompting import for_template
from edge_runtime.tools.reader import CallReader
from edge_runtime.tools.wish import FIELDS, ToolWish


class Calling:
    """Thread safe."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._form = call_format(template.source)

    @cached_property
    def _markers(self) -> dict[int, str]:
        """Special tokens around calls."""
        markers = (self._form.opening, self._form.closing)
        return {token: text for text in markers if (token := self._special(text)) is not None}

    def render(self, request: TierRequest) -> str:
        """The prompt of messages. TemplateError, InvalidRequest."""
        prompt = request.prompt
        assert isinstance(prompt, Messages)
        try:
            wish = ToolWish.of(request.about.extras)
        except InvalidRequest:  # for a server elsewhere, which may know them: here it is just as long
            wish = None
        if wish is None and not prompt.of_tools:
            return self._template.render(prompt.messages)
        messages, tools = for_template(prompt.messages, wish, self._form)
        return self._template.render(messages, tools=tools)

    def params(self, request: TierRequest) -> SamplingParams:
        """With the form that calls must have. InvalidRequest."""
        wish = ToolWish.of(request.about.extras)
        if wish is None:
            return request.params
        answer = request.params.grammar
        if answer is not None and (answer.begun or answer.openings):
            return request.params  # made here before, and the answer has begun
        return replace(request.params, grammar=call_grammar(self._form, wish, self._special, answer))

    def reading(self, request: TierRequest) -> Callable[[], CallReader] | None:
        """How a completion is read; None: it is text."""
        wish = ToolWish.of(request.about.extras)
        if wish is None:
            return None
        names = [each.name for each in wish.functions]
        return lambda: CallReader(self._form, names)

    def decoding(self, request: TierRequest) -> Decoding | None:
        """What the request has, with the special tokens around calls in the text."""
        given = request.decoding
        if ToolWish.of(request.about.extras) is None or not self._markers:
            return given

        def decoding(decode: Callable[[Sequence[int]], str], plain: TokenText) -> TokenText:
            return _Marked(plain if given is None else given(decode, plain), self._markers)

        return decoding

    def _special(self, text: str) -> int | None:
        token = self._tokenizer.token_to_id(text) if text else None
        return token if token in self._tokenizer.special_ids else None


def unsupported(extras: Mapping[str, Any]) -> str | None:
    """Of a request's extras the first that no model here knows; None: they can be had. InvalidRequest as for
    :meth:`ToolWish.of`."""
    other = sorted(set(extras) - set(FIELDS))
    if other:
        return f"{', '.join(other)} is not supported by models here: leave it out"
    ToolWish.of(extras)
    return None


class _Marked:
    """A stream of text in which some special tokens are seen."""

    def __init__(self, inner: TokenText, markers: dict[int, str]) -> None:
        self._inner = inner
        self._markers = markers

    def add(self, token: int, /) -> str:
        marker = self._markers.get(token)
        return self._inner.add(token) if marker is None else self._inner.flush() + marker

    def flush(self) -> str:
        return self._inner.flush()
