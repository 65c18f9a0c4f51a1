"""Chat templates: those of known families and some that mean harm, rearranged."""

from __future__ import annotations

import random
import re

from tests.fuzz.mutation import NOT_UTF8, damage, rearrange
from tests.fuzz.surface import Case, Surface
from tests.fuzz.surfaces.package import SmallPackage
from tests.fuzz.surfaces.text import use_template
from tests.runtime.test_hostile_templates import ENDLESS, ESCAPES, HUGE
from tests.runtime.test_template import GEMMA, QWEN3, SMOLLM2

_TOKEN = re.compile(r"\{%-?|-?%\}|\{\{-?|-?\}\}|\w+|\s+|[^\w\s]")
_WORDS = (
    "{%", "%}", "{{", "}}", "{#", "#}", "for", "endfor", "in", "if", "endif", "set", "macro", "endmacro", "call",
    "filter", "block", "raw", "endraw", "recursive", "loop", "loop(", "self", "namespace(", "range(", "10**9",
    "2**31", "-1", "0",
    "|", "|tojson", "|join", "|map(", "|list", "|string", "|int", "|float", "|length", "|sort", "|unique", "|groupby(",
    "|batch(", "|slice(", "|center(", "|indent(", "|replace(", "|format(", "|round(", "|sum", "|xmlattr", "|urlize",
    "|wordwrap(", "|truncate(", "|pprint", "|dictsort", "|attr(", "|default(", "|random", "|reverse",
    "|tojson(indent=9)", "messages", "tools", "[::-1]", "[", "]", "(", ")", ".", ",", "'", '"', "~", "%", "**", "*",
    "//", "is", "not",
    "none", "'a' * 10**8", "raise_exception(", "strftime_now(", "cycler(", "joiner(", "dict(", "(1).__class__", "__",
    "is divisibleby", "is sameas", "\0", "é", "\n", "\\", "1e400", "9" * 5000, "(" * 500, "[" * 200, "x" * 10_000,
    "{% if 1 %}" * 50,
)  # fmt: skip
_VALUES = {
    "text": ("messages[0].content", "messages[-1]['role']", "bos_token", "'a' ~ 3", "(messages|last).content[:2]",
             "strftime_now('%Y')", "'x' if tools else 'y'", "'é\u3042' * 3", "messages|tojson"),
    "list": ("messages", "[1, 2]", "messages[::-1]", "messages|map(attribute='role')|list", "range(3)|list",
             "'a b c'.split()", "{'a': 1}.items()|list", "messages|selectattr('role', 'equalto', 'user')|list"),
    "number": ("3", "messages|length", "1.5 + 2 ** 3 % 5 // 2", "namespace(a=1).a", "-7", "'12'|int", "true + 1"),
    "any": ("none", "true", "tools", "add_generation_prompt", "{'a': 1}", "messages[0].role == 'user'", "messages[0]"),
}  # fmt: skip
_FILTERS = {
    "text": ("", "|upper", "|trim", "|length", "|list", "|default('d')", "|replace('a', 'b')", "|first", "|indent(2)",
             "|capitalize", "|truncate(4)", "|center(9)", "|int", "|e", "|title", "|reverse", ".split('e')|join"),
    "list": ("", "|tojson(indent=2)", "|length", "|join(', ')", "|last", "|string", "|reverse|list", "|batch(2)|list"),
    "number": ("", "|string", "|float|round(1)", "|abs", "|tojson", "|int"),
    "any": ("", "|string", "|tojson", "|default('d', true)"),
}  # fmt: skip
_TESTS = ("is defined", "is none", "is string", "is iterable", "is mapping", "in [1, 'a']", "== 'a'", "is not number")


def _sound(rng: random.Random, depth: int = 3) -> str:
    """A template that is one by its grammar."""
    way, kind = rng.randrange(10 if depth else 4), rng.choice(list(_VALUES))
    value = f"({rng.choice(_VALUES[kind])}){rng.choice(_FILTERS[kind])}"
    if way < 3:
        return f"{{{{ {value} }}}}"
    if way == 3:
        return rng.choice(("text\n", "<s>", "é ", "{# #}", "{% raw %}{{ }}{% endraw %}", "{%- set y = 1 -%}\n"))
    inner = "".join(_sound(rng, depth - 1) for _ in range(rng.randint(1, 3)))
    return {
        4: f"{{% if {value} {rng.choice(_TESTS)} %}}{inner}{{% else %}}x{{% endif %}}",
        5: f"{{% for m in messages %}}{{{{ loop.index0 ~ m.role }}}}{inner}{{% endfor %}}",
        6: f"{{%- for i in range({rng.randint(0, 30)}) if (i is even) -%}}{inner}{{%- else %}}e{{% endfor %}}",
        7: f"{{% set z = namespace(n={value}) %}}{{% set z.n = z.n %}}{inner}{{{{ z.n }}}}",
        8: f"{{% macro f(a, b=2) %}}{{{{ a }}}}{inner}{{% endmacro %}}{{{{ f({value}) }}}}{{{{ f(1, b=3) }}}}",
        9: f"{{% set t %}}{inner}{{% endset %}}{{{{ t }}}}{{% filter upper %}}{{{{ t }}}}{{% endfilter %}}",
    }[way]


class Templates(Surface):
    name = "template"
    weight = 8

    def prepare(self) -> list[Case]:
        sound = [SMOLLM2, QWEN3, GEMMA.replace("messages[0]['role'] == 'system'", "false")]
        self._known = sound[:2]
        harmful = [source for each in (ENDLESS, HUGE, ESCAPES) for source in each.values()]
        self._sources = [_TOKEN.findall(source) for source in (*sound * 8, *harmful)]
        return [Case("chat_template.jinja", source.encode()) for source in self._known]

    def make(self, rng: random.Random) -> Case:
        if rng.random() < 0.5:
            before = rng.choice(("", "", self._known[0], self._known[1]))
            return Case(
                "chat_template.jinja", (before + "".join(_sound(rng) for _ in range(rng.randint(1, 4)))).encode()
            )
        source = rearrange(rng, rng.choice(self._sources), self._sources, _WORDS).encode()
        if rng.random() < 0.1:
            source = damage(rng, source + rng.choice(NOT_UTF8), most=2)
        return Case("chat_template.jinja", source)

    def open(self) -> None:
        self._package = SmallPackage(self.folder / "package", {})

    def run(self, case: Case) -> None:
        package = self._package.with_file(case.name, case.data)
        use_template(package.chat_template, package.manifest.special_tokens)
