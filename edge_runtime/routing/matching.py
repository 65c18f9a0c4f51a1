"""Which task class of the policy a request belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edge_runtime.facts import Facts
from edge_runtime.policy.patterns import Pattern, words_pattern
from edge_runtime.policy.rules import UNMATCHED, TaskClass

Condition = Callable[[Facts], bool]


@dataclass(frozen=True)
class Matched:
    """The class, and the conditions that held, in words."""

    task: TaskClass
    because: str


class Matcher:
    """Built once for a policy. PolicyError for a pattern that is none."""

    def __init__(self, classes: Sequence[TaskClass]) -> None:
        self._classes = [(each, list(_conditions(each))) for each in classes]

    def __call__(self, facts: Facts) -> Matched:
        """The first class whose conditions all hold, else :data:`~edge_runtime.policy.rules.UNMATCHED`."""
        for task, conditions in self._classes:
            if all(holds(facts) for _, holds in conditions):
                return Matched(task, ", ".join(words for words, _ in conditions) or "takes every request")
        return Matched(UNMATCHED, "no class of the policy takes it")


def _conditions(task: TaskClass) -> Iterator[tuple[str, Condition]]:
    """Each in words; the cheap ones first."""
    match, where = task.match, f"class {task.name}"
    if (tools := match.tools) is not None:
        yield f"tools {_asked(tools)}", lambda facts: facts.about.tools is tools
    if (schema := match.schema) is not None:
        yield f"schema {_asked(schema)}", lambda facts: facts.request.wants_json is schema
    for kind, wanted in (("field", match.field), ("metadata", match.metadata), ("header", match.header)):
        for name, value in wanted.items():
            yield f"{kind} {name} = {value}", _equals(kind, name, value)
    if (tokens := match.tokens) is not None:
        length = f"{tokens.min} tokens or more" if tokens.max is None else f"{tokens.min} to {tokens.max} tokens"
        yield length, lambda facts: tokens.holds(facts.tokens)
    if match.keywords is not None:
        words = words_pattern(match.keywords, f"{where}: keywords")
        yield "a keyword", lambda facts: words.found(facts.question)
    if match.regex is not None:
        pattern = Pattern(match.regex, f"{where}: regex")
        yield "the pattern", lambda facts: pattern.found(facts.question)
    if (languages := match.languages) is not None:
        yield f"language {'/'.join(languages)}", lambda facts: facts.language in languages


def _equals(kind: str, name: str, value: str) -> Condition:
    def holds(facts: Facts) -> bool:
        about = facts.about
        there: Mapping[str, str] = {"field": about.fields, "metadata": about.metadata, "header": about.headers}[kind]
        return there.get(name.lower() if kind == "header" else name) == value

    return holds


def _asked(value: bool) -> str:
    return "asked for" if value else "not asked for"
