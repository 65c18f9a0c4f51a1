"""Chat templates: from messages to the text a model was trained on.

A template is Jinja source that came with a model, so it is not trusted: it runs in a sandbox with bounds on work
and output (:mod:`edge_runtime.template_sandbox`). What a template sees is what Transformers'
``apply_chat_template`` shows it: ``messages``, ``tools`` and ``documents`` (None), ``add_generation_prompt``, the
special tokens (``bos_token``, …), ``raise_exception``, ``strftime_now``, ``namespace``, ``tojson`` without HTML
escapes, ``break``/``continue``, and ``{% generation %}`` as a plain block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import InvalidRequest, TemplateError

if TYPE_CHECKING:
    from edge_runtime.template_sandbox import Sandbox


class ChatTemplate:
    """``source`` is Jinja; None stands for a model without a template, whose :meth:`render` refuses.

    ``special_tokens`` are the texts that templates know by name, such as ``bos_token`` and ``eos_token``.
    Raises TemplateError if the source does not compile. Rendering is thread safe.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._sandbox = _compile(source) if source is not None else None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any) -> str:
        """The prompt's text, special tokens spelled out; encode it with ``parse_special=True``.

        A message has a ``role`` and a ``content``: a string, or a list of ``{"type": "text", "text": …}`` parts, which
        are joined by newlines (as llama.cpp and vLLM do, because most templates take only strings). ``extra`` are
        further names for the template (plain JSON values), such as ``enable_thinking``.

        Raises InvalidRequest (``param`` set) for messages of another form, and TemplateError if there is no template,
        if the template refuses the messages or fails, and if it leaves the sandbox or its bounds.
        """
        plain = plain_messages(messages)
        if self._sandbox is None:
            raise TemplateError(
                "this model has no chat template, so it cannot take messages: send plain text (/v1/completions), "
                "or give it a chat_template.jinja",
                "messages",
            )
        names: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens}
        for name, value in extra.items():
            names[name] = _plain(value, name)
        names |= {"messages": plain, "add_generation_prompt": add_generation_prompt}
        return self._sandbox.render(names)


def _compile(source: str) -> Sandbox:
    from edge_runtime.template_sandbox import Sandbox  # late: jinja2 takes a while to import

    return Sandbox(source)


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy made of plain values only, contents as strings. InvalidRequest names the place that is wrong."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequest(f"messages must be a list, not {type(messages).__name__}", "messages")
    if not messages:
        raise InvalidRequest("messages must hold at least one message", "messages")
    return [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be an object with role and content, not {type(message).__name__}", where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}.role must be a non-empty string, not {role!r}", f"{where}.role")
    if "content" not in message:
        raise InvalidRequest(f"{where}.content is missing", f"{where}.content")
    rest = {key: _plain(value, where) for key, value in message.items() if key not in ("role", "content")}
    return {"role": str(role), "content": _plain_content(message["content"], f"{where}.content"), **rest}


def _plain_content(content: object, where: str) -> str:
    if isinstance(content, str):
        return str(content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidRequest(f"{where} must be a string or a list of text parts, not {type(content).__name__}", where)
    return "\n".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part_text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text":
        raise InvalidRequest(f"{where} is a part of type {kind!r}: this model takes only text parts", where)
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.text must be a string, not {type(text).__name__}", f"{where}.text")
    return str(text)


def _plain(value: Any, where: str) -> Any:
    """JSON values rebuilt from the exact built-in types: richer objects have methods the sandbox does not know."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    raise InvalidRequest(f"{where} holds a {type(value).__name__}, which is not a JSON value", where)
