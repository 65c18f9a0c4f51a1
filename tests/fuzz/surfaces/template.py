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


class Templates(Surface):
    name = "template"
    weight = 8

    def prepare(self) -> list[Case]:
        sound = [SMOLLM2, QWEN3, GEMMA.replace("messages[0]['role'] == 'system'", "false")]
        harmful = [source for each in (ENDLESS, HUGE, ESCAPES) for source in each.values()]
        self._sources = [_TOKEN.findall(source) for source in (*sound * 8, *harmful)]
        return [Case("chat_template.jinja", source.encode()) for source in sound[:2]]

    def make(self, rng: random.Random) -> Case:
        source = rearrange(rng, rng.choice(self._sources), self._sources, _WORDS).encode()
        if rng.random() < 0.1:
            source = damage(rng, source + rng.choice(NOT_UTF8), most=2)
        return Case("chat_template.jinja", source)

    def open(self) -> None:
        self._package = SmallPackage(self.folder / "package", {})

    def run(self, case: Case) -> None:
        package = self._package.with_file(case.name, case.data)
        use_template(package.chat_template, package.manifest.special_tokens)
