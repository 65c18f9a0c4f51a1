"""``edge-glm plan``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any, NamedTuple

from edge_runtime.columns import columns
from edge_runtime.errors import ConfigError
from edge_runtime.memory import parse_budget, parse_bytes
from edge_runtime.paths import home
from edge_runtime.planning import Candidate, Need, Plan
from edge_runtime.planning import plan as make_plan
from edge_runtime.settings import load_settings
from edge_runtime.store import Store
from edge_runtime.timing.model import Estimate, TimingModel

_MIB = 1 << 20


class Asked(NamedTuple):
    """The request whose times are told, in tokens."""

    prompt: int
    new_tokens: int


def plan(arguments: argparse.Namespace) -> int:
    """0 if something fits, else 1, with the refusal on standard error; the table or the JSON is printed either way."""
    asked = Asked(arguments.prompt, arguments.new_tokens)
    if min(asked) < 1:
        raise ConfigError(f"--prompt and --new-tokens are at least 1, not {asked.prompt} and {asked.new_tokens}")
    names = ("device", "weights", "memory_budget", "kv_type", "workload", "prefix_store", "draft", "draft_device")
    settings = load_settings({name: getattr(arguments, name) for name in names})
    size = None if settings.memory_budget is None else parse_budget(settings.memory_budget)
    need = Need(
        weights=settings.weights,
        kv_type=settings.kv_type,
        context=arguments.context,
        sequences=arguments.sequences,
        workload=settings.workload or "one",
        prefix_store=parse_bytes(settings.prefix_store) > 0,
        draft=settings.draft,
        draft_device=settings.draft_device,
    )
    made = make_plan(Store(home()), arguments.ref, settings.device, size, need)
    print(json.dumps(_row(made, asked), indent=2) if arguments.json else f"{_table(made)}\n\n{_times(made, asked)}")
    if made.choice is None:
        print(f"edge-glm: {made.reason}", file=sys.stderr)
    return 0 if made.choice else 1


def _row(made: Plan, asked: Asked) -> dict[str, Any]:
    shown = made.choice or next(iter(made.candidates), None)
    about = {} if shown is None else _about(shown, asked)
    return {
        "fits": made.choice is not None,
        "choice": None if made.choice is None else {"device": made.choice.device, "variant": made.choice.variant},
        "parts": about.get("parts"),
        "draft_bytes": about.get("draft_bytes"),
        "peak_bytes": about.get("peak_bytes"),
        "max_context": about.get("max_context"),
        "max_sequences": about.get("max_sequences"),
        "budget_bytes": about.get("budget_bytes"),
        "estimated": made.estimated,
        "reason": made.reason,
        "candidates": [_about(each, asked) for each in made.candidates],
    }


def _about(candidate: Candidate, asked: Asked) -> dict[str, Any]:
    return {
        "device": candidate.device,
        "variant": candidate.variant,
        "fits": candidate.fits,
        "parts": candidate.parts._asdict(),
        "draft_bytes": candidate.draft,
        "peak_bytes": candidate.peak,
        "least_budget_bytes": candidate.least,
        "budget_bytes": None if candidate.budget is None else candidate.budget.nbytes,
        "max_context": candidate.max_context,
        "max_sequences": candidate.max_sequences,
        "reason": candidate.reason,
        "timing": _timing(candidate, asked),
    }


def _timing(candidate: Candidate, asked: Asked) -> dict[str, Any]:
    estimates = _estimates(candidate, asked)
    if isinstance(estimates, str):
        return {"not_known": estimates}
    seconds = {name: dataclasses.asdict(each) for name, each in estimates.items()}
    return {"prompt_tokens": asked.prompt, "new_tokens": asked.new_tokens, **seconds}


def _estimates(candidate: Candidate, asked: Asked) -> dict[str, Estimate] | str:
    """Of first token, each token and the whole answer; or why there are none."""
    model = candidate.timing
    if not isinstance(model, TimingModel):
        return str(candidate.reason if model is None else model)
    prompt, new = asked
    if prompt + new > candidate.max_context:
        return f"{prompt} tokens and {new} more do not fit the context of {candidate.max_context}"
    return {
        "ttft_s": model.ttft(prompt),
        "tpot_s": model.tpot(prompt + new // 2),
        "total_s": model.total(prompt, new),
    }


def _table(made: Plan) -> str:
    """MiB. One row for each candidate, the chosen one marked; then why the others cannot be taken."""
    head = ["", "device", "variant", "base", "weights", "loading", "kv", "prefix", "activations"]
    drafts = any(each.draft for each in made.candidates)
    rows = [[*head, *(["draft"] if drafts else []), "peak", "least", "context"]]
    for each in made.candidates:
        sizes = [*each.parts, *([each.draft] if drafts else []), each.peak, each.least]
        mark = "*" if each is made.choice else "" if each.fits else "-"
        rows.append([mark, each.device, each.variant, *(f"{size / _MIB:.0f}" for size in sizes), str(each.max_context)])
    lines = [columns(rows, "lllr", head=True)]
    budgets = {each.device: each.budget for each in made.candidates if each.budget is not None}
    estimated = "; sizes of files are estimated" if made.estimated else ""
    lines += [f"MiB, within {said}{estimated}" for said in dict.fromkeys(str(budget) for budget in budgets.values())]
    if made.choice is not None:
        lines += [f"- {each.device}: {each.reason}" for each in made.candidates if not each.fits]
        lines.append(f"* {made.choice.device}, {made.reason}")
    return "\n".join(lines)


def _times(made: Plan, asked: Asked) -> str:
    """With error bars, of the devices that were measured here; then what is not known of the others, and why."""
    found = [(each, _estimates(each, asked)) for each in made.candidates]
    rows = [
        [each.device, each.variant, *map(str, estimates.values())]
        for each, estimates in found
        if not isinstance(estimates, str)
    ]
    said = f"{asked.prompt} prompt tokens and {asked.new_tokens} new ones here, nine times in ten:"
    lines = []
    if rows:
        lines = [said, columns([["device", "variant", "first token", "each token", "all"], *rows], "l", head=True)]
    return "\n".join([*lines, *(f"time on {each.device}: {why}" for each, why in found if isinstance(why, str))])
