"""The search: one lever after the other, each challenger in turns with the best so far, the winner in turns with the
default once more.

A machine that does other things as well makes any run slow now and then, so nothing is decided by two single runs.
Challengers and the setup that they challenge run one after the other, round by round, in an order that moves on; only
the ratios of a round count. A challenger wins if, by Student's t over the logarithms of at least three such ratios, it
is faster by more than :data:`MARGIN` with 95 % confidence. Among many that are tried one may win by luck: so what is
found is confirmed against the default in rounds of its own, and dropped if it is not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.tuning.records import Figures, Outcome, Run, Setup, Trial, Verdict
from edge_runtime.tuning.space import HISTORY, Scope, challengers, changes_answers, levers

MARGIN = 1.01
"""What is gained at least, or the default is kept."""
LOSS = 1.005
"""The loss per token may be so much of the default's; the int4 encodings differ by 0.1 %."""
CONFIRMATION = "confirmation"
"""The lever of the last trials."""
_UNDECIDED = ("within the noise", "no time")
_ROUNDS = 5
_LEAST_ROUNDS = 3
_CONFIRMING_ROUNDS = 6
_HOPELESS = 0.9
"""A challenger that is so slow in its first round gets no second."""
_PATIENCE = 3.0
"""A challenger may take so many times the default's time, and then some for opening, until it is given up."""
_OPENING_S = 20.0
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895)
"""Student's t, 95 % one-sided, for 1, 2, … degrees of freedom."""

Measure = Callable[[Setup, bool, float], Figures]
"""How it is opened, whether to score the text too, and the seconds after which to give up → what came of it.

Raises EdgeError for what cannot be opened or measured."""
Watch = Callable[[str, float], None]
"""What is being tried, and how many seconds have gone."""


@dataclass
class _Contest:
    """One challenger's rounds."""

    setup: Setup
    gains: list[float] = field(default_factory=list)
    outcome: Outcome | None = None
    why: str | None = None

    def judge(self) -> None:
        """Decide if that can be done by now."""
        if len(self.gains) >= _LEAST_ROUNDS:
            low, high = bounds(self.gains)
            self.outcome = "won" if low > MARGIN else "lost" if high < MARGIN else None

    def drop_hopeless(self) -> None:
        """What is slower so far is left alone, for the time is better spent on others."""
        if self.gains and statistics.geometric_mean(self.gains) < (_HOPELESS if len(self.gains) == 1 else 1):
            self.outcome = "lost"


class Search:
    """Fills a :class:`Run`: trials and verdicts as they come, so that whatever ends it early loses nothing."""

    def __init__(
        self,
        run: Run,
        scope: Scope,
        measure: Measure,
        watch: Watch = lambda what, gone: None,
        *,
        keep: Callable[[Run], None] = lambda run: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``keep`` gets the run after each trial and each lever. ``clock``: seconds."""
        self._run, self._scope = run, scope
        self._measure, self._watch, self._keep, self._clock = measure, watch, keep, clock
        self._began = clock()
        self._loss: float | None = None
        """Of the default, per token."""

    def go(self) -> None:
        """ConfigError if the default itself cannot be measured."""
        run = self._run
        first = self._try("default", run.default, self._left(), score=True)
        if isinstance(first, str):
            raise ConfigError(f"the default, {run.default}, cannot be measured, so there is nothing to beat: {first}")
        self._loss = first.nll
        for lever in levers(self._scope):
            self._race(lever, challengers(lever, run.candidate, self._scope))
            self._keep(run)
        self._confirm()
        self._keep(run)

    # --- one lever ----------------------------------------------------------------------------------------------------

    def _race(self, lever: str, setups: Sequence[Setup]) -> None:
        """The candidate is whoever wins it."""
        against = self._run.candidate
        known = [(each.setup, each.against) for each in self._run.verdicts if each.outcome != "no time"]
        contests = [_Contest(setup) for setup in setups if (setup, against) not in known]
        for number in range(_ROUNDS):
            running = [each for each in contests if each.outcome is None]
            fitting = max(int(self._spare() // self._usual(against)) - 1, 0)
            for each in running[fitting:]:
                each.outcome = "no time"
            running = running[:fitting]
            if not running:
                break
            self._round(lever, against, running, number, score=number == 0)
            for each in running:
                if each.outcome is None:
                    each.judge()
                if each.outcome is None:
                    each.drop_hopeless()
        verdicts = [_verdict(lever, each, against) for each in contests]
        self._run.verdicts += verdicts
        winners = [each for each in verdicts if each.outcome == "won"]
        if winners:
            self._run.candidate = max(winners, key=lambda each: each.low or 0.0).setup

    def _round(self, lever: str, against: Setup, contests: list[_Contest], number: int, *, score: bool = False) -> None:
        """Each once, the first place moving on; a ratio for all that were measured."""
        order: list[_Contest | None] = [None, *contests]
        place = number % len(order)
        found: Figures | str | None = None
        times: list[tuple[_Contest, float]] = []
        for each in [*order[place:], *order[:place]]:
            if each is None:
                found = self._try(lever, against, self._left())
                continue
            scored = score and changes_answers(each.setup, self._run.default)
            figures = self._try(lever, each.setup, self._patience(lever), score=scored)
            if isinstance(figures, str):
                if self._patience(lever) > 0:  # else it was only the end of the time
                    each.outcome, each.why = "failed", figures
            elif self._loses_answers(figures):
                each.outcome = "loses answers"
                each.why = f"the loss per token is {figures.nll:.3f}, the default's {self._loss:.3f}"
            else:
                times.append((each, figures.seconds))
        if isinstance(found, Figures):
            for each, seconds in times:
                each.gains.append(found.seconds / seconds)

    def _loses_answers(self, figures: Figures) -> bool:
        return figures.nll is not None and self._loss is not None and not figures.nll <= self._loss * LOSS

    # --- the end ------------------------------------------------------------------------------------------------------

    def _confirm(self) -> None:
        run = self._run
        if run.candidate == run.default:
            # the time put aside is better spent on what it was cut short for than on nothing
            cut = [each for each in run.verdicts if each.outcome == "no time" and (each.gain or 0) > MARGIN]
            run.candidate = max(cut, key=lambda each: each.gain or 0).setup if cut else run.default
        if run.candidate == run.default:
            # what was found earlier stays unless it was found to be wrong
            held = [each for each in run.verdicts if each.lever == HISTORY and each.outcome in _UNDECIDED]
            run.best = None if held else run.default
            return
        contest = _Contest(run.candidate)
        for number in range(_CONFIRMING_ROUNDS):
            if self._left() < self._usual(run.default) + self._usual(run.candidate) or contest.outcome is not None:
                break
            self._round(CONFIRMATION, run.default, [contest], number)
        if contest.outcome is None:
            contest.judge()
        if contest.outcome is None and len(contest.gains) < _LEAST_ROUNDS:
            contest.outcome = "no time"
        verdict = _verdict(CONFIRMATION, contest, run.default)
        run.verdicts.append(verdict)
        if verdict.outcome == "won":
            run.best, run.gain = run.candidate, verdict.gain
        elif verdict.outcome != "no time":
            run.best = run.default

    # --- trials and time ----------------------------------------------------------------------------------------------

    def _try(self, lever: str, setup: Setup, limit_s: float, *, score: bool = False) -> Figures | str:
        """Its figures, or why there are none."""
        if limit_s <= 0:
            return "no time was left"
        at = self._gone()
        self._watch(f"{lever}: {setup}", at)
        figures, failure = None, None
        try:
            figures = self._measure(setup, score, limit_s)
        except EdgeError as error:
            failure = str(error)
        self._run.trials.append(Trial(lever, setup, at, self._gone() - at, figures, failure))
        self._keep(self._run)  # each took seconds, or minutes
        return failure or "nothing was measured" if figures is None else figures

    def _gone(self) -> float:
        return self._clock() - self._began

    def _left(self) -> float:
        return self._run.limit_s - self._gone()

    def _spare(self) -> float:
        """Seconds left when those for confirming are put aside."""
        round_s = self._usual(self._run.default) + self._usual(self._run.candidate)
        return self._left() - (_LEAST_ROUNDS + 1) * round_s

    def _usual(self, setup: Setup) -> float:
        """Seconds of its trials, on average."""
        return statistics.fmean(trial.took_s for trial in self._run.trials if trial.setup == setup)

    def _patience(self, lever: str) -> float:
        if lever == CONFIRMATION:
            return self._left()
        return min(self._spare(), _PATIENCE * self._usual(self._run.candidate) + _OPENING_S)


def bounds(gains: Sequence[float]) -> tuple[float, float]:
    """Between which their geometric mean is, with 95 % confidence on either side; (0, ∞) for fewer than two."""
    if len(gains) < 2:
        return 0.0, math.inf
    logs = [math.log(each) for each in gains]
    mean = statistics.fmean(logs)
    half = _T95[min(len(logs) - 1, len(_T95)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean - half), math.exp(mean + half)


def _verdict(lever: str, contest: _Contest, against: Setup) -> Verdict:
    known = len(contest.gains) >= _LEAST_ROUNDS
    low, high = bounds(contest.gains) if known else (None, None)
    outcome = contest.outcome or "within the noise"
    return Verdict(lever, contest.setup, against, outcome, tuple(contest.gains), low, high, contest.why)
