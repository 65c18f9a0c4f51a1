"""The form that an answer must have, whatever the model would say by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edge_runtime.errors import InvalidRequest

LONGEST = 2**18
"""Characters of a grammar."""


@dataclass(frozen=True)
class Grammar:
    """InvalidRequest for what is no grammar of its kind at first sight; the rest shows when it meets a tokenizer
    (:mod:`edge_runtime.constraints`)."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    text: str = ""
    """The schema as JSON, the regular expression (Rust's syntax) or the Lark grammar (llguidance's dialect)."""
    name: str = "answer"
    description: str | None = None
    strict: bool | None = None
    """Of a schema, as OpenAI's API has them: they are for a remote tier."""
    begun: str = ""
    """What there is of the answer already."""
    openings: tuple[str, ...] = ()
    """The form holds from the first of these on, which it includes; text before it is free. Empty: from the start."""
    at_start: bool = False
    """An opening counts at the answer's start only."""
    field: str = "response_format"
    """Of the request, by which it is asked for; refusals name it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "openings", tuple(self.openings))  # a list, where it was kept as JSON
        if len(self.text) > LONGEST:
            raise InvalidRequest(
                f"the grammar has {len(self.text):,} characters; the limit is {LONGEST:,}", "response_format"
            )

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def json_schema(
        cls, schema: Mapping[str, Any], name: str = "answer", description: str | None = None, strict: bool | None = None
    ) -> Grammar:
        """JSON by a schema. Keywords that cannot be held to are refused, not ignored."""
        if not isinstance(schema, Mapping):
            raise InvalidRequest(f"a JSON schema is an object, not {schema!r}", "response_format")
        try:
            return cls("json_schema", json.dumps(schema), name, description, strict)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"the schema is not JSON: {error}", "response_format") from error

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """The whole answer matches."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, text: str) -> Grammar:
        return cls("lark", text)

    @property
    def json(self) -> bool:
        return self.kind in ("json_object", "json_schema")

    @property
    def response_format(self) -> dict[str, Any]:
        """As OpenAI's API asks for it. Only where it is ``json``."""
        if self.kind == "json_object":
            return {"type": "json_object"}
        more = {key: value for key in ("description", "strict") if (value := getattr(self, key)) is not None}
        schema = {"name": self.name, "schema": json.loads(self.text), **more}
        return {"type": "json_schema", "json_schema": schema}
