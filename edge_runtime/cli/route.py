"""``edge-glm route``: which tier a prompt would go to and why; checking a policy; calibrating for a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.cli.run import open_model
from edge_runtime.cli.serve import only_model
from edge_runtime.errors import ConfigError, PolicyError
from edge_runtime.paths import home
from edge_runtime.policy.check import problems
from edge_runtime.policy.rules import read_policy
from edge_runtime.prompts import About, Messages, TierRequest
from edge_runtime.sampling import SamplingParams
from edge_runtime.settings import Settings, load_settings
from edge_runtime.store import Store


def route(arguments: argparse.Namespace) -> int:
    names = ("model", "device", "policy", "offline", "memory_budget")
    settings = load_settings({name: getattr(arguments, name) for name in names})
    words: list[str] = arguments.words
    if arguments.check:
        return _check(settings, words)
    if words[:1] == ["tasks"] and len(words) == 1 and arguments.output:
        return _tasks(arguments)
    if words[:1] == ["calibrate"] and len(words) == 2:
        return _calibrate(arguments, settings, Path(words[1]))
    if len(words) != 1:
        raise ConfigError('give one prompt, in quotes: edge-glm route "Why is the sky blue?"')
    return _explain(arguments, settings, sys.stdin.read() if words[0] == "-" else words[0])


def _check(settings: Settings, words: Sequence[str]) -> int:
    """0 if the policy can be used; else 1, and everything that is wrong with it."""
    path = words[0] if words else settings.policy
    if path is None:
        raise ConfigError("which policy? edge-glm route --check FILE")
    policy = read_policy(Path(path))
    wrong = problems(policy)
    if wrong:
        raise PolicyError("; ".join(wrong))
    from edge_runtime.stages.registry import Stages

    stages = Stages(policy.stages)
    print(f"{path} can be used: {len(policy.tiers)} tiers, {len(policy.classes)} classes")
    for task in policy.classes:
        tiers = ", ".join(
            tier.name for tier in policy.tiers_of(task) if not tier.remote or task.privacy != "local-only"
        )
        print(f"  {task.name}: {tiers}; {task.mode}, privacy {task.privacy}")
    for name, why in stages.aside.items():
        print(f"  stage {name} would be put aside: {why}")
    return 0


def _explain(arguments: argparse.Namespace, settings: Settings, prompt: str) -> int:
    if settings.policy is None:
        raise ConfigError("which policy? edge-glm route PROMPT --policy FILE")
    about = About(
        headers={name.lower(): value for name, value in _pairs(arguments.header)},
        metadata=dict(_pairs(arguments.metadata)),
        fields=dict(_pairs(arguments.field)),
    )
    params = SamplingParams(max_tokens=arguments.max_tokens)
    with open_model(settings.model or only_model(Store(home())), settings) as llm:
        assert llm.tiers is not None
        decision = llm.tiers.decide(TierRequest(Messages([{"role": "user", "content": prompt}]), params, about))
        shown: dict[str, Any] = {
            "class": decision.task.name,
            "because": decision.route.because,
            "mode": decision.task.mode,
            "privacy": decision.task.privacy,
            "tokens": decision.facts.tokens,
            "language": decision.facts.language,
            "order": list(decision.plan.order),
            "tiers": dict(decision.route.reasons),
            "judged": decision.plan.judge,
            "good": decision.route.good,
            "signals": dict(decision.signals),
        }
        if arguments.answer:
            chunks = llm.stream([{"role": "user", "content": prompt}], params)
            answer = "".join(chunk.text for chunk in chunks)
            shown |= {"good": chunks.route.good, "signals": dict(chunks.route.signals), "tiers": chunks.route.reasons}
            shown |= {"answered by": chunks.route.tier, "answer": answer, "headers": chunks.route.headers()}
    print(json.dumps(shown, indent=2, ensure_ascii=False) if arguments.json else _text(shown))
    return 0


def _text(shown: dict[str, Any]) -> str:
    order = " → ".join(shown["order"]) or "nobody"
    lines = [
        f"class     {shown['class']} ({shown['because']}); {shown['mode']}, privacy {shown['privacy']}",
        f"prompt    {shown['tokens']} tokens, language {shown['language'] or 'unknown'}",
        f"goes to   {order}" + ("; a local answer is judged by its first words" if shown["judged"] else ""),
        *(f"  {name}: {reason}" for name, reason in shown["tiers"].items()),
    ]
    if shown["good"] is not None:
        lines.append(f"P(local answer good enough) = {shown['good']:.3f}")
    lines.append("signals")
    lines += [f"  {name:<26}{value:8.3f}" for name, value in sorted(shown["signals"].items())]
    if "answer" in shown:
        lines.append(f"answered by {shown['answered by']}: {shown['answer']}")
    return "\n".join(lines)


def _pairs(given: Sequence[str] | None) -> list[tuple[str, str]]:
    pairs = [text.partition("=") for text in given or ()]
    wrong = next((text for text, (name, sign, _) in zip(given or (), pairs, strict=True) if not name or not sign), None)
    if wrong is not None:
        raise ConfigError(f"{wrong!r} is not NAME=VALUE")
    return [(name, value) for name, _, value in pairs]


# --- calibrating ------------------------------------------------------------------------------------------------------


def _tasks(arguments: argparse.Namespace) -> int:
    from edge_runtime.routing.calibrate import Row
    from edge_runtime.routing.tasks import tasks

    rows = [
        Row(prompt=task.prompt, answer=task.answer, family=task.family, split=task.split)
        for split in ("train", "test")
        for task in tasks(split, arguments.count, arguments.seed)
    ]
    Path(arguments.output).write_bytes(b"\n".join(msgspec.json.encode(row) for row in rows) + b"\n")
    print(f"{arguments.output}: {len(rows)} tasks")
    return 0


def _calibrate(arguments: argparse.Namespace, settings: Settings, data: Path) -> int:
    from edge_runtime.cli.progress import Bars
    from edge_runtime.routing.calibrate import calibrate, observe, read_rows
    from edge_runtime.routing.calibration_report import lines, report

    rows = read_rows(data)
    output = Path(arguments.output or "calibration.json")
    with open_model(settings.model or only_model(Store(home())), settings, "many") as llm, Bars() as bars:
        observed = observe(llm.local, llm.tokenizer, rows, lambda done: bars("answers", done, len(rows)))
        fitted = calibrate(llm.model_id, observed, share=arguments.remote_share, quality=arguments.quality)
    output.write_bytes(msgspec.json.format(msgspec.json.encode(fitted.calibration)))
    print("\n".join(lines(fitted)))
    print(f'written to {output}; in the policy: [routing] calibration = "{output}"')
    if arguments.html:
        Path(arguments.html).write_text(report(fitted), encoding="utf-8")
    return 0
