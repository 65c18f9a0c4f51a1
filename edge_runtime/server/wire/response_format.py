"""``response_format``: the form that the answer to a chat must have."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``strict`` makes no difference here: an answer always has the form."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A grammar is asked for as OpenAI's custom tools do: ``{"type": "grammar", "syntax": "lark" or "regex",
    "definition": text}``."""

    type: str
    json_schema: JsonSchema | None = None
    syntax: str | None = None
    definition: str | None = None

    def grammar(self) -> Grammar | None:
        """None: text, of any form. InvalidRequest, with the field's path."""
        if self.type != "json_schema" and self.json_schema is not None:
            raise InvalidRequest(f"a response_format of type {self.type} has no json_schema", "response_format")
        if self.type != "grammar" and (self.syntax is not None or self.definition is not None):
            raise InvalidRequest(
                f"a response_format of type {self.type} has neither syntax nor definition", "response_format"
            )
        if self.type == "grammar":
            return self._grammar()
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar.json_object()
        if self.type != "json_schema":
            raise InvalidRequest(
                f"response_format.type must be text, json_object, json_schema or grammar, not {self.type!r}",
                "response_format.type",
            )
        wish = self.json_schema
        if wish is None:
            raise InvalidRequest("response_format.json_schema is missing", "response_format.json_schema")
        if not _NAME.fullmatch(wish.name):
            raise InvalidRequest(
                "response_format.json_schema.name must have 1 to 64 letters, digits, _ or -",
                "response_format.json_schema.name",
            )
        return Grammar.json_schema(wish.schema or {}, wish.name, wish.description, wish.strict)

    def _grammar(self) -> Grammar:
        if not self.definition:
            raise InvalidRequest("response_format.definition is missing", "response_format.definition")
        if self.syntax not in ("lark", "regex"):
            raise InvalidRequest(
                f"response_format.syntax must be lark or regex, not {self.syntax!r}", "response_format.syntax"
            )
        return Grammar.lark(self.definition) if self.syntax == "lark" else Grammar.regex(self.definition)
