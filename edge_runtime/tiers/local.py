"""The tier on this machine: chat template, tokenizer, length check against the device's real limit, engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edge_runtime.constraints import Grammars
from edge_runtime.engine import Engine
from edge_runtime.errors import InvalidRequest
from edge_runtime.generation import Generation
from edge_runtime.grammar import Grammar
from edge_runtime.prompts import Fit, Messages, Text, TierRequest, TokenIds
from edge_runtime.template import ChatTemplate
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.tools.calling import Calling
from edge_runtime.tools.calling import unsupported as unsupported_tools
from edge_runtime.tracing.trace import span


class LocalTier:
    """A model in this process. ``defaults`` is its generation_config.json; ``add_bos`` concerns plain text."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        max_prompt: int,
        max_context: int,
        add_bos: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._calling = Calling(tokenizer, template)
        self._max_prompt = max_prompt
        self._max_context = max_context
        self._add_bos = add_bos
        self._defaults = dict(defaults or {})

    def fit(self, request: TierRequest) -> Fit:
        return Fit(len(self.encode(request)), self._max_prompt, self._max_context)

    def unsupported(self, request: TierRequest) -> str | None:
        """Why no model here can take it, on whatever device; None: it can."""
        try:
            wished = unsupported_tools(request.about.extras)
            grammar = self._calling.params(request).grammar if wished is None else None
        except InvalidRequest as error:
            return str(error)
        return wished or unsupported_grammar(grammar, self._engine.grammars)

    def prepare(self, request: TierRequest) -> TierRequest:
        """The same request with the prompt as token ids, so that it is rendered and tokenized once."""
        return replace(request, prompt=TokenIds(self.encode(request)))

    def encode(self, request: TierRequest) -> list[int]:
        """The prompt's token ids. TemplateError, InvalidRequest."""
        prompt = request.prompt
        if isinstance(prompt, Messages):
            # the template spells out bos and every other marker itself
            with span("template"):
                text = self._calling.render(request)
            with span("tokenize"):
                return self._tokenizer.encode(text, parse_special=True)
        if isinstance(prompt, Text):
            with span("tokenize"):
                return self._tokenizer.encode(prompt.text, add_bos=self._add_bos)
        return list(prompt.ids)

    def encode_text(self, text: str) -> list[int]:
        """Of text that stands behind other text."""
        return self._tokenizer.encode(text)

    def start(self, request: TierRequest) -> Generation:
        """Submit and return at once; errors of the request raise here, later ones come as chunks."""
        ids = self.encode(request)
        calling = self._calling
        params = calling.params(request).resolved(self._defaults)
        decoding, reading = calling.decoding(request), calling.reading(request)
        return self._engine.submit(ids, params, self._tokenizer.eos_ids, request.watch, decoding, reading)


def unsupported_grammar(grammar: Grammar | None, grammars: Grammars | None) -> str | None:
    """Why no answer of a model with these ``grammars`` can be held to it; None: one can."""
    return None if grammar is None or grammars is None else grammars.refusal(grammar)
