"""Which requests met their class's latency, and the reason of each that did not."""

from __future__ import annotations

from typing import Any

import pytest

from edge_runtime.tracing.objectives import MOST_CLASSES, MOST_MISSES, Objectives, phases, why
from edge_runtime.tracing.trace import PARTS, Part, Trace

MS = 1_000_000


def traced(*spans: tuple[Part, float], first: float | None = None, **about: Any) -> Trace:
    """Spans of so many milliseconds, one after the other; ``first``: when the first token came."""
    trace = Trace()
    lane = trace.lane("test", trace.started)
    at = trace.started
    for part, took in spans:
        at += int(took * MS)
        lane.mark(part, at)
    trace.ended = at
    if first is not None:
        trace.say(ttft_ms=first)
    trace.say(
        **{"task": "chat", "tier": "local", "outcome": "whole", "prompt_tokens": 9, "completion_tokens": 3, **about}
    )
    return trace


LONG_PROMPT = [("queue", 5), ("tokenize", 3), ("prefill", 700), ("sample", 1), ("decode", 2000)]


@pytest.mark.parametrize(
    ("spans", "first", "about", "reason"),
    [
        (LONG_PROMPT, 709, {"wanted_ttft_ms": 800}, None),
        (LONG_PROMPT, 709, {"wanted_ttft_ms": 500}, "prompt"),
        (LONG_PROMPT, 709, {"wanted_ttft_ms": 500, "degraded": 1}, "fell back"),
        (LONG_PROMPT, 709, {"wanted_ttft_ms": 800, "wanted_total_ms": 1000}, "decoding"),
        (LONG_PROMPT, 709, {"wanted_total_ms": 3000}, None),
        ([("queue", 400), ("wait", 300), ("prefill", 500)], 1200, {"wanted_ttft_ms": 500}, "queue"),
        ([("load", 3000), ("prefill", 500)], 3500, {"wanted_ttft_ms": 500}, "load"),
        ([("route", 1), ("upstream", 900), ("send", 5)], 901, {"wanted_ttft_ms": 500, "tier": "cloud"}, "elsewhere"),
        ([("prefill", 100), ("decode", 350), ("judge", 90)], 540, {"wanted_ttft_ms": 500}, "held back"),
        ([("receive", 900), ("prefill", 100)], 1000, {"wanted_ttft_ms": 500}, "other"),
        ([("prefill", 100)], None, {"wanted_ttft_ms": 500, "outcome": "failed"}, "failed"),
    ],
)
def test_reasons(
    spans: list[tuple[Part, float]], first: float | None, about: dict[str, Any], reason: str | None
) -> None:
    heard: list[tuple[str, str]] = []
    objectives = Objectives(lambda task, outcome: heard.append((task, outcome)))
    objectives(traced(*spans, first=first, **about))
    (told,) = objectives.report()["classes"]
    assert told["requests"] == 1
    assert told["met"] == (reason is None)
    assert told["share"] == float(reason is None)
    assert told["missed"] == ({} if reason is None else {reason: 1})
    assert heard == [("chat", reason or "met")]
    assert [each["reason"] for each in objectives.report()["misses"]] == ([] if reason is None else [reason])


@pytest.mark.parametrize(
    "about", [{}, {"wanted_ttft_ms": 5, "outcome": "left"}, {"wanted_ttft_ms": 5, "outcome": None}]
)
def test_what_does_not_count(about: dict[str, Any]) -> None:
    objectives = Objectives()
    trace = traced(("prefill", 900), first=900, **{key: value for key, value in about.items() if value is not None})
    if about.get("outcome", "") is None:
        del trace.about["outcome"]
    objectives(trace)
    objectives(Trace())
    assert objectives.report() == {"classes": [], "misses": []}


def test_shares_of_several_classes() -> None:
    objectives = Objectives()
    for first in (100, 200, 300, 900):
        objectives(traced(("prefill", first), first=first, wanted_ttft_ms=250))
    objectives(traced(("prefill", 50), first=50, wanted_ttft_ms=40, wanted_total_ms=90, task="quick"))
    chat, quick = objectives.report()["classes"]
    assert (chat["class"], chat["requests"], chat["met"], chat["share"]) == ("chat", 4, 2, 0.5)
    assert (chat["wanted_ttft_ms"], chat["wanted_total_ms"], chat["missed"]) == (250, None, {"prompt": 2})
    assert (quick["class"], quick["share"], quick["wanted_total_ms"]) == ("quick", 0.0, 90)
    newest = objectives.report()["misses"][0]
    assert (newest["class"], newest["ttft_ms"], newest["spent_ms"]) == ("quick", 50, {"prompt": 50})


def test_it_stays_small() -> None:
    objectives = Objectives()
    for number in range(MOST_CLASSES + 50):
        objectives(traced(("prefill", 9), first=9, wanted_ttft_ms=1, task=f"class {number}"))
    report = objectives.report()
    assert len(report["classes"]) == MOST_CLASSES
    assert len(report["misses"]) == MOST_MISSES
    objectives(traced(("prefill", 9), first=9, wanted_ttft_ms=1, task="class 0"))
    assert objectives.report()["classes"][0]["requests"] == 2


def test_phases_end_with_the_first_token() -> None:
    trace = traced(*LONG_PROMPT)
    assert phases(trace, 500) == pytest.approx({"queue": 5, "prompt": 495})
    assert phases(trace)["decoding"] == pytest.approx(2001)
    assert sum(phases(trace).values()) == pytest.approx(2709)
    assert set(phases(traced(*((part, 1) for part in PARTS)))) <= {
        "queue", "load", "prompt", "elsewhere", "held back", "decoding", "other",
    }  # fmt: skip
    assert why({}, False, True) == "other"
