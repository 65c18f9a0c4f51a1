"""Chat templates that mean harm: no way out of the sandbox or its bounds."""

from __future__ import annotations

import tracemalloc

import pytest

from edge_runtime.errors import TemplateError
from edge_runtime.template import ChatTemplate

DOUBLING = "{%% set ns = namespace(x=%s) %%}{%% for i in range(200) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
ENDLESS = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops that filter": "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "block": "{% block a %}{{ self.a() }}{% endblock %}",
    "comparisons": "{% set a = range(100000)|list %}" + "{% if 'a' in a %}{% endif %}" * 1500,
    "strip": "{{ (('b' * 3000000) ~ 'c').strip(('a' * 3000000) ~ 'b') }}",
    "rfind": "{{ ('a' * 3000000).rfind('b' ~ 'a' * 1500000) }}",
    "lazy chain": "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = ns.x|map('upper') %}"
    "{% endfor %}{{ ns.x|list }}",
    "quadratic sum": "{{ [[1], [2]]|sum(start=[]) }}",
}
HUGE = {
    "product": "{{ 'a' * 10**10 }}",
    "constant product": "{% set x = 'a' * 10000000000 %}",
    "list product": "{% set x = [1] * 1000000000 %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": DOUBLING % ("2", "ns.x * ns.x"),
    "center": "{{ 'x'|center(10000000000) }}",
    "center block": "{% filter center(10000000000) %}x{% endfilter %}",
    "center method": "{{ 'x'.center(10000000000) }}",
    "zfill": "{{ 'x'.zfill(10000000000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent filter": "{{ '%10000000000d'|format(1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format nested": "{{ '{:{w}}'.format(1, w=10000000000) }}",
    "concat": DOUBLING % ("'a'", "ns.x ~ ns.x"),
    "add": DOUBLING % ("'a'", "ns.x + ns.x"),
    "join": DOUBLING % ("'a'", "[ns.x, ns.x]|join"),
    "join method": "{{ ('b' * 100000).join(range(100000)|map('string')) }}",
    "join filter": "{{ range(100000)|join('b' * 100000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "plain text in a loop": "{% for i in range(100000) %}" + "x" * 10000 + "{% endfor %}",
    "plain text in a macro": "{% macro f() %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endmacro %}"
    "{% set x = f() %}",
    "shared lists": DOUBLING % ("[1]", "[ns.x, ns.x]"),
    "shared tuples": DOUBLING % ("(1,)", "(ns.x, ns.x)"),
    "shared dicts": DOUBLING % ("{}", "{'a': ns.x, 'b': ns.x}"),
    "shared views": DOUBLING % ("1", "{'a': ns.x, 'b': ns.x}.values()"),
    "shared namespaces": DOUBLING % ("1", "namespace(a=ns.x, b=ns.x)"),
    "indent": "{{ ('\n' * 1000)|indent(10000000, true, true) }}",
    "tojson": "{{ [1]|tojson(indent=1000000000) }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
}
ESCAPES = {
    "class": "{{ ''.__class__ }}",
    "class by key": "{{ ''['__class__'] }}",
    "class by filter": "{{ ''|attr('__class__') }}",
    "class by map": "{{ ['']|map(attribute='__class__')|list }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "joiner": "{{ joiner.__init__.__globals__.os.popen('id').read() }}",
    "function": "{{ raise_exception.__globals__ }}",
    "macro": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "method": "{{ messages.append(1) }}",
    "dict method": "{{ messages[0].update({}) }}",
    "encode": "{{ 'a'.encode() }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "namespace kwarg": "{{ namespace(__class__=1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "loop": "{% for i in [1] %}{{ loop.__init__ }}{% endfor %}",
    "self": "{{ self.__init__.__globals__ }}",
    "undefined": "{{ nothing.__class__.__init__ }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_endless_work_ends(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE)
def test_huge_values_are_not_made(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            ChatTemplate(source).render([{"role": "user", "content": "Hi"}])
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES)
def test_sandbox(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ 'a'|striptags }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for a in [1] %}" * 100 + "{% endfor %}" * 100,
        "x" * 1_000_000,
    ],
    ids=["syntax", "filter", "parentheses", "nesting", "size"],
)
def test_what_does_not_compile(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source)
