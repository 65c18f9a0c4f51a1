"""Calibrating the router for a model, on requests of which it is known how well it answers them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.facts import Facts
from edge_runtime.policy.rules import Hold, Routing
from edge_runtime.prompts import Messages, TierRequest
from edge_runtime.routing.answer_signals import agreement, confidence_signals, surprise_signals, text_signals
from edge_runtime.routing.calibration import SCHEMA, Calibration, Measured, Point, curve, threshold_for
from edge_runtime.routing.consistency import fork_params
from edge_runtime.routing.logistic import Logistic, auroc, fit
from edge_runtime.routing.tasks import right
from edge_runtime.sampling import SamplingParams
from edge_runtime.stages.registry import Stages
from edge_runtime.tiers.model import LocalModel
from edge_runtime.watch import Watch

AT_ONCE = 8
PENALTIES = (3.0, 10.0, 30.0, 100.0, 300.0)
NEVER_GOOD = 0.02
"""Of the good local answers so many may be lost by not asking the local model at all."""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A line of DATA.jsonl: a request, and either the ``answer`` that a good reply holds
    (:func:`edge_runtime.routing.tasks.right`) or what the local reply is worth."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    answer: str | None = None
    local_good: float | None = None
    """0 … 1."""
    remote_good: float = 1.0
    family: str = ""
    """Rows of one kind; kinds are kept apart between fitting and testing."""
    split: str | None = None
    """``train`` or ``test``; None: a third of the families is held out, or of the rows, if there are none."""
    max_tokens: int = 48


@dataclass(frozen=True)
class Observation:
    row: Row
    before: Mapping[str, float]
    during: Mapping[str, float]
    consistent: Mapping[str, float]
    good: float


class Tokenizer(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


def read_rows(path: Path) -> list[Row]:
    """ConfigError names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=Row)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if (row.prompt is None) == (row.messages is None) or (row.answer is None) == (row.local_good is None):
            raise ConfigError(f"{path}, line {number}: give prompt or messages, and answer or local_good")
        if row.split not in (None, "train", "test") or not 0 <= (row.local_good or 0) <= 1 >= row.remote_good >= 0:
            raise ConfigError(f"{path}, line {number}: split is train or test, worths are from 0 to 1")
        rows.append(row)
    return rows


def observe(
    model: LocalModel, tokenizer: Tokenizer, rows: Sequence[Row], progress: Callable[[int], None] = lambda done: None
) -> list[Observation]:
    """Have the model answer every row, several at a time, as the router would see it."""
    stages = Stages()

    def one(row: Row) -> Observation:
        messages = row.messages or [{"role": "user", "content": row.prompt}]
        params = SamplingParams(temperature=0, max_tokens=row.max_tokens)
        prepared = model.prepare(TierRequest(Messages(messages), params))
        facts = Facts(TierRequest(Messages(messages), SamplingParams()), len(prepared.ids))
        watch = Watch(tokens=Hold().tokens)
        tokens, text = _answer(model, replace(prepared, watch=watch))
        rules = Routing()
        forks = _forks(model, replace(prepared, params=fork_params(params, rules.forks, rules.fork_tokens)))
        before = stages.signals(facts)
        head = tokenizer.decode(tokens[: Hold().tokens])
        during = {
            **before,
            **surprise_signals(watch),
            **confidence_signals(watch.answer),
            **text_signals(head, facts.question),
        }
        good = row.local_good if row.local_good is not None else float(right(text, row.answer or ""))
        return Observation(row, before, during, {**during, "agreement": agreement(forks)}, good)

    found = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done, each in enumerate(pool.map(one, rows), start=1):
            found.append(each)
            progress(done)
    return found


def _answer(model: LocalModel, request: TierRequest) -> tuple[list[int], str]:
    with closing(model.start(request)) as generation:
        chunks = [chunk.checked() for chunk in generation]
    return [token for chunk in chunks for token in chunk.token_ids], "".join(chunk.text for chunk in chunks)


def _forks(model: LocalModel, request: TierRequest) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(request.params.n)]
    with closing(model.start(request)) as generation:
        for chunk in generation:
            found[chunk.index] += chunk.checked().token_ids
    return found


# --- fitting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A calibration, and how it does on rows that it has not seen."""

    calibration: Calibration
    scores: Mapping[str, Sequence[float]]
    """``before``, ``during``, ``consistent``: of the held-out rows."""
    good: Sequence[float]
    """What the local answers to them are worth."""
    points: Sequence[Point]
    """Cost and quality, by ``during``."""
    chosen: Point
    """What the threshold means there."""


def calibrate(
    model: str, observed: Sequence[Observation], *, share: float | None = None, quality: float | None = None
) -> Fitted:
    """Fit on the training rows and try on the others. ``share``: of requests that may go to a remote tier;
    ``quality``: of the remote's, that is to be kept. EdgeError where the rows do not do."""
    train, test = _split(observed)
    if not train or not test:
        raise EdgeError("there must be rows to fit on and rows to try on: give more, or more families")
    models = {kind: _best(train, kind) for kind in ("before", "during", "consistent")}
    scores = {kind: [fitted(getattr(each, kind)) for each in test] for kind, fitted in models.items()}
    good = [each.good for each in test]
    remote = [each.row.remote_good for each in test]
    points = curve(scores["during"], good, remote)
    chosen = threshold_for(points, share=share, quality=quality)
    before = [models["before"](each.before) for each in train if each.good > 0.5]
    measured = Measured(
        tasks=len(test),
        good=float(np.mean(good)),
        auroc_before=auroc(scores["before"], good),
        auroc_during=auroc(scores["during"], good),
        auroc_consistent=auroc(scores["consistent"], good),
        remote_share=chosen.remote_share,
        quality=chosen.quality,
    )
    calibration = Calibration(
        schema=SCHEMA,
        model=model,
        **models,
        threshold=chosen.threshold,
        remote_below=float(np.quantile(before, NEVER_GOOD)) if before else 0.0,
        measured=measured,
    )
    return Fitted(calibration, scores, good, points, chosen)


def _best(rows: Sequence[Observation], kind: str) -> Logistic:
    """With the penalty that does best on families left out of the fit, one after the other."""
    signals, good = [getattr(each, kind) for each in rows], [each.good for each in rows]
    folds = list(_folds(rows))

    def left_out(penalty: float) -> float:
        scores: list[float] = [0.0] * len(rows)
        for fold in folds:
            rest = [place for place in range(len(rows)) if place not in fold]
            fitted = _fit([signals[place] for place in rest], [good[place] for place in rest], penalty)
            for place in fold:
                scores[place] = fitted(signals[place])
        return auroc(scores, good)

    return _fit(signals, good, max(PENALTIES, key=left_out))


def _fit(signals: Sequence[Mapping[str, float]], good: Sequence[float], penalty: float) -> Logistic:
    try:
        return fit(signals, good, penalty)
    except ValueError as error:
        raise EdgeError(f"the local model's answers cannot be calibrated: {error}") from error


def _folds(rows: Sequence[Observation]) -> Iterator[set[int]]:
    families = sorted({each.row.family for each in rows})
    if len(families) < 3:
        yield from ({place for place in range(len(rows)) if place % 5 == fold} for fold in range(5))
    else:
        yield from ({place for place, each in enumerate(rows) if each.row.family == name} for name in families)


def _split(observed: Sequence[Observation]) -> tuple[list[Observation], list[Observation]]:
    if any(each.row.split is not None for each in observed):
        return (
            [each for each in observed if each.row.split != "test"],
            [each for each in observed if each.row.split == "test"],
        )
    families = sorted({each.row.family for each in observed})
    draw = random.Random(0)
    if len(families) >= 3:
        held = set(draw.sample(families, max(1, len(families) // 3)))
        return (
            [each for each in observed if each.row.family not in held],
            [each for each in observed if each.row.family in held],
        )
    mixed = draw.sample(list(observed), len(observed))
    cut = len(mixed) * 2 // 3
    return mixed[:cut], mixed[cut:]
