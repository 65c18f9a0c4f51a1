"""Jinja, sandboxed as Transformers does, with bounds on the work and memory a template may take.

Jinja's own sandbox keeps a template from reaching into Python, but not from running forever or filling memory.
Here every loop turn, call, filter, test, comparison, operator and output first goes through a :class:`Meter`:

- it holds one budget of *units* (about a byte each), spent on every value made, **before** it is made where its size
  can be large (``'a' * n``, ``center(n)``, ``replace``, ``join``, ``%`` and ``{}`` formats);
- it looks at the clock, so that what is cheap in units but endless still ends.

The nodes without a hook of their own are rewritten in the syntax tree: loop bodies and conditions, comparisons,
literals of lists, tuples and dicts, slices, ``~`` and plain text. Nothing is evaluated while compiling.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from jinja2.visitor import NodeTransformer

from edge_runtime.errors import TemplateError
from edge_runtime.template_bounds import (
    ALLOWED_METHODS,
    STRING_COSTS,
    Formatter,
    Meter,
    bounded_filters,
    percent_format,
    product_cost,
)

MAX_SOURCE = 100_000
"""Characters of template source. The longest in use are about 30,000."""
MAX_DEPTH = 64
"""Macros and recursive loops inside each other."""


class Sandbox:
    """One compiled template. TemplateError if it does not compile. Thread safe."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters; the limit is {MAX_SOURCE}")
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:  # Python's compiler has limits of its own: RecursionError, SyntaxError, MemoryError
            raise TemplateError(f"the chat template does not compile: {_summary(error)}") from error

    def render(self, names: Mapping[str, Any]) -> str:
        """TemplateError for whatever goes wrong in the template. ``names`` hold plain values only."""
        try:
            return self._environment.metered(Meter(names), lambda: self._template.render(names))
        except TemplateError:
            raise
        except SecurityError as error:
            raise TemplateError(f"the chat template reached outside its sandbox: {error}", "messages") from error
        except _Refused as error:
            raise TemplateError(f"the chat template refuses these messages: {error}", "messages") from error
        except Exception as error:  # a template can raise nearly anything: TypeError, KeyError, ZeroDivisionError, …
            raise TemplateError(f"the chat template failed: {_summary(error)}", "messages") from error


def _summary(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


class _Refused(jinja2.TemplateError):
    """``raise_exception(message)`` was called."""


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            optimized=False,  # the optimizer would evaluate constant expressions, without bounds, while compiling
            finalize=_output,
        )
        self._local = threading.local()
        self.filters = bounded_filters(self.filters, lambda: self.meter)
        self.filters |= {"tojson": self._tojson, "~join": self._concat, "~tick": self._ticked, "~made": self._made}
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: self._timed(test) for name, test in tests.items() if name not in ("lower", "upper")}
        # lipsum is left out: it makes text of any length and no chat template uses it
        self.globals = {
            "range": self._range,
            "dict": _Dict(),
            "namespace": _Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    @property
    def meter(self) -> Meter:
        meter: Meter = self._local.meter
        return meter

    def metered(self, meter: Meter, run: Callable[[], str]) -> str:
        self._local.meter = meter
        try:
            return run()
        finally:
            del self._local.meter

    # --- hooks of Jinja ---

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Rewriter().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, _OPEN_TYPES):
            return True
        return any(attr in names for kind, names in ALLOWED_METHODS.items() if isinstance(obj, kind))

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # Jinja would print an empty string for it
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if getattr(value, "__name__", None) not in ("format", "format_map") or not isinstance(
            getattr(value, "__self__", None), str
        ):
            return None
        if value.__name__ == "format_map":
            raise SecurityError("access to attribute 'format_map' of a str is not allowed")
        text = str(value.__self__)
        return lambda *args, **kwargs: Formatter(self, self.meter).vformat(text, args, kwargs)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __self.meter
        own = {key: kwargs.pop(key) for key in ("_loop_vars", "_block_vars") if key in kwargs}  # Jinja's
        meter.spend_on(args)
        meter.spend_on(kwargs)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and (cost := STRING_COSTS.get(__obj.__name__)) is not None:
            args = cost(meter, owner, *args, **kwargs)
            kwargs = {}
        if meter.depth >= MAX_DEPTH:
            raise TemplateError(f"the chat template calls itself more than {MAX_DEPTH} deep", "messages")
        meter.depth += 1
        try:
            result = super().call(__context, __obj, *args, **kwargs, **own)
        finally:
            meter.depth -= 1
        meter.spend_on(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        if operator == "%" and isinstance(left, str):
            return percent_format(meter, left, right)
        meter.spend(product_cost(operator, left, right))
        result = super().call_binop(context, operator, left, right)
        meter.spend_on(result)
        return result

    # --- what rewritten nodes and globals call ---

    def _ticked(self, value: Any) -> Any:
        self.meter.spend(1)
        return value

    def _made(self, value: Any) -> Any:
        self.meter.spend_on(value)
        return value

    def _concat(self, *values: Any) -> str:
        self.meter.spend_on(values)
        return "".join(map(str, values))

    def _timed(self, test: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.meter.spend(1)
            return test(*args, **kwargs)

        return wraps(test)(timed)  # keeps Jinja's mark of what is passed first

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        if any(abs(arg) > 2**31 for arg in args) or len(numbers) > 100_000:
            raise TemplateError("the chat template asks for a range of more than 100000 numbers", "messages")
        return numbers

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Sequence[str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As in Transformers: unlike Jinja's own, no HTML escapes."""
        pair = None if separators is None else (str(separators[0]), str(separators[1]))
        self.meter.spend_on(value, times=1 + sum(map(len, pair or ())))
        options: dict[str, Any] = {"ensure_ascii": ensure_ascii, "separators": pair, "sort_keys": sort_keys}
        if indent is None:
            return json.dumps(value, **options)
        if (len(indent) if isinstance(indent, str) else indent) > 32:
            raise TemplateError("the chat template asks tojson for an indent of more than 32 characters", "messages")
        chunks: list[str] = []
        for chunk in json.JSONEncoder(indent=indent, **options).iterencode(value):
            self.meter.spend(len(chunk))
            chunks.append(chunk)
        return "".join(chunks)


@pass_context
def _output(context: Context, value: Any) -> str:
    """Every piece of output passes here. Taking the context also keeps Jinja from folding constants."""
    environment = context.environment
    assert isinstance(environment, _Environment)
    environment.meter.spend_on(value)
    return str(value)


class _Rewriter(NodeTransformer):
    """Sends what has no hook of its own through filters; templates cannot spell names that begin with ``~``."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_through("~tick", nodes.Const(0, lineno=node.lineno)), lineno=node.lineno))
        if node.test is not None:
            node.test = _through("~tick", node.test)  # type: ignore[arg-type]  # Jinja says Node, its parser makes an Expr
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _through("~tick", node.expr)
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Filter:
        self.generic_visit(node)
        return _through("~made", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _through("~made", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _through("~made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _through("~join", *node.nodes)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        return nodes.Const(node.data, lineno=node.lineno)  # so that it passes the output hook: it can stand in a loop


def _through(name: str, first: nodes.Expr, *rest: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(first, name, list(rest), [], None, None, lineno=first.lineno)


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's tokens for training; here it is only a block."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own form)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """A namespace that takes no name beginning with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Namespace: `namespace(self=1)` is allowed
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}")


_OPEN_TYPES = (_Namespace, _Dict, LoopContext, Macro, Cycler, Joiner, TemplateReference, Undefined)
"""Objects of the template language itself: their public attributes are for templates."""


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 200:
        raise TemplateError("the chat template asks for a date format of more than 200 characters", "messages")
    return datetime.now().strftime(format)
