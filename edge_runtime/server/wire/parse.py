"""A request's JSON, checked strictly: an unknown field, a wrong type or an unsupported wish is refused by name.

Fields that would change the answer and are not supported are accepted only with the values that ask for nothing
(:data:`_ASKS_NOTHING`), so that ``audio: null`` passes and ``audio: {...}`` does not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol, TypeVar

import msgspec

from edge_runtime.errors import InvalidRequest


class Checked(Protocol):
    def check(self) -> None:
        """InvalidRequest for what the types do not say."""


Body = TypeVar("Body", bound=Checked)

_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"(?:unknown|required) field `(?P<name>[^`]*)`")


def parse(body: bytes, kind: type[Body]) -> Body:
    """The request in ``body``, checked. InvalidRequest with the field's path as ``param``."""
    try:
        request: Body = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error}" if body else "the body is empty: send JSON"
        ) from error
    except RecursionError as error:
        raise InvalidRequest("the body's JSON is nested too deep") from error
    request.check()
    return request


def _invalid(text: str) -> InvalidRequest:
    found = _PATH.match(text)
    assert found is not None  # everything matches
    what, path = found["what"], found["path"] or ""
    field = _FIELD.search(what)
    if field is not None:
        path = f"{path}.{field['name']}" if path else field["name"]
        if "unknown" in what:
            return InvalidRequest(f"{path} is not a field this server knows", path)
        return InvalidRequest(f"{path} is missing", path)
    what = what.replace("`", "")
    return InvalidRequest(
        f"{path}: {what[0].lower()}{what[1:]}" if path else f"the body: {what[0].lower()}{what[1:]}", path or None
    )


_ASKS_NOTHING: Mapping[str, tuple[object, ...]] = {
    "store": (None, False),
    "service_tier": (None, "auto", "default", "flex"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    # of messages
    "refusal": (None,),
    "annotations": (None, []),
}
"""Field that is not supported → the values that ask for nothing."""


def refuse_unsupported(
    struct: msgspec.Struct, passed_on: Collection[str] = (), harmless: Mapping[str, tuple[object, ...]] = _ASKS_NOTHING
) -> None:
    """``passed_on``: fields that may go to a server elsewhere, which may know them. ``harmless``: as
    :data:`_ASKS_NOTHING`."""
    for name in struct.__struct_fields__:
        if name not in passed_on and not asks_nothing(name, getattr(struct, name), harmless):
            raise unsupported(name)


def asks_nothing(name: str, value: Any, harmless: Mapping[str, tuple[object, ...]] = _ASKS_NOTHING) -> bool:
    """The field is supported, or its value asks for nothing."""
    values = harmless.get(name)
    # 1 == True and 0 == False in Python, but not in JSON
    return values is None or any(type(value) is type(allowed) and value == allowed for allowed in values)


def unsupported(name: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is not supported by this server: leave it out", name)
