"""How many tokens are worth drafting: by what steps and drafts have taken here, and how many drafted tokens have held.

The expected tokens of a step with a draft of k are ``1 + a + … + a^k``, where ``a`` is the share of drafted tokens that
hold (Leviathan et al. 2023, arXiv 2211.17192); its time is that of one step of ``1 + k`` tokens and of k of the draft.
"""

from __future__ import annotations

import numpy as np

LONGEST = 8
"""Tokens of a draft."""
_WEIGHT = 0.2
"""Of the newest time in a running mean."""
_PRIOR = (3.0, 4.0)
"""Tokens that held, of tokens that were drafted, before anything is known."""
_MEMORY = 0.98
"""What past tokens count for after each draft."""
_GAIN = 1.03
"""By which a draft has to be better than none: times are not exact."""
FIRST_WAIT, LONGEST_WAIT = 256, 4096
"""Steps without a draft after none was worth it, until it is looked at again; twice as many each time."""
FIRST_TRIALS, LATER_TRIALS = 6, 2
"""Drafts that are made before it is decided that none is worth it: a step of a new size takes longer when it is new."""
_TRIED = (3, 7)
"""Lengths that are tried in turns, where none seems worth it yet."""


class DraftPace:
    """Seconds and tokens in, the length of the next draft out."""

    def __init__(self) -> None:
        self._steps = _Times()
        self._drafts = _Times()
        self._held, self._drafted = _PRIOR
        self._wait = 0
        self._next_wait = FIRST_WAIT
        self._trials = FIRST_TRIALS

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that hold, as far as they were looked at."""
        return self._held / self._drafted

    @property
    def off(self) -> bool:
        """No draft was worth its time when last looked at."""
        return self._wait > 0

    def step_took(self, tokens: int, seconds: float) -> None:
        """A step of the model with so many tokens, over all its requests."""
        self._steps.note(tokens, seconds)

    def draft_took(self, requests: int, seconds: float) -> None:
        """A step of the draft, a token for each of so many requests."""
        self._drafts.note(requests, seconds)

    def fared(self, drafted: int, accepted: int) -> None:
        """Of a draft so many tokens held; those after the first that did not were never looked at."""
        looked_at = min(accepted + 1, drafted)
        self._held = self._held * _MEMORY + accepted
        self._drafted = self._drafted * _MEMORY + looked_at

    def length(self, requests: int, most: int) -> int:
        """Tokens to draft for each of so many requests, at most ``most``; 0: none."""
        if self._wait:
            self._wait -= 1
            return 0
        if most < 1 or not self._steps:  # a plain step tells first what a draft has to beat
            return 0
        longest = self._best(requests, min(most, LONGEST))
        if longest:
            self._next_wait = FIRST_WAIT
            return longest
        if self._trials:
            self._trials -= 1
            return min(most, _TRIED[self._trials % len(_TRIED)])
        self._trials = LATER_TRIALS
        self._wait, self._next_wait = self._next_wait, min(2 * self._next_wait, LONGEST_WAIT)
        return 0

    def _best(self, requests: int, most: int) -> int:
        """The length with the highest rate of tokens, by what is known; what is not known yet looks cheap."""
        best, longest = _GAIN / self._steps.at(requests), 0
        expected = 1.0
        for count in range(1, most + 1):
            expected += self.acceptance**count
            seconds = self._steps.at(requests * (1 + count)) + count * self._drafts.at(requests)
            if expected / seconds > best:
                best, longest = expected / seconds, count
        return longest


class _Times:
    """Running means of seconds, by a number of tokens."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}
        self._new: set[int] = set()
        """Seen once."""

    def __bool__(self) -> bool:
        return bool(self._means)

    def note(self, key: int, seconds: float) -> None:
        before = self._means.get(key)
        if before is None:
            self._new.add(key)
            self._means[key] = seconds
        elif key in self._new:  # the first of a size may have packed weights or compiled something
            self._new.remove(key)
            self._means[key] = min(before, seconds)
        else:
            self._means[key] = before + _WEIGHT * (seconds - before)

    def at(self, key: int) -> float:
        """Between what was measured a line, beyond it what is nearest; 0 where nothing was."""
        known = sorted(self._means)
        return float(np.interp(key, known, [self._means[each] for each in known])) if known else 0.0
