"""How many tokens are worth drafting: by what steps and drafts have taken here, and how many drafted tokens have held.

The expected tokens of a step with a draft of k are ``1 + a + … + a^k``, where ``a`` is the share of drafted tokens that
hold (Leviathan et al. 2023, arXiv 2211.17192); its time is that of one step of ``1 + k`` tokens and of k of the draft.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from statistics import median_low

LONGEST = 8
"""Tokens of a draft."""
_PRIOR = (3.0, 4.0)
"""Tokens that held, of tokens that were drafted, before anything is known."""
_MEMORY = 0.98
"""What past tokens count for after each draft."""
_GAIN = 1.03
"""By which a draft has to be better than none: times are not exact."""
FIRST_TRIALS, LATER_TRIALS = 6, 4
"""Drafts that are made before it is decided that none is worth it: a step of a new size takes longer when it is new."""
_TRIED = (3, 7)
"""Lengths that are tried in turns, where none seems worth it yet."""
TRIAL_SHARE = 0.02
"""Of the time, that looking again may lose where no draft is worth it: text changes, and with it what holds."""
_SHORTEST_WAIT, _LONGEST_WAIT = 16, 4096
"""Steps without a draft until it is looked at again."""
_SAMPLES = 5
"""Newest times of a size, of which the median counts."""


class DraftPace:
    """Seconds and tokens in, the length of the next draft out."""

    def __init__(self) -> None:
        self._steps = _Times()
        self._drafts = _Times()
        self._held, self._drafted = _PRIOR
        self._wait = 0
        self._trials = FIRST_TRIALS
        self._caught_up = 0.0
        """Seconds, since drafts were last worth it or waited for."""

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that hold, as far as they were looked at."""
        return self._held / self._drafted

    def step_took(self, tokens: int, seconds: float) -> None:
        """A step of the model with so many tokens, over all its requests."""
        self._steps.note(tokens, seconds)

    def draft_took(self, requests: int, seconds: float) -> None:
        """A step of the draft, a token for each of so many requests."""
        self._drafts.note(requests, seconds)

    def caught_up(self, seconds: float) -> None:
        """A step of the draft that read what it had not of the texts, as after steps without."""
        self._caught_up += seconds

    def fared(self, drafted: int, accepted: int) -> None:
        """Of a draft so many tokens held; those after the first that did not were never looked at."""
        looked_at = min(accepted + 1, drafted)
        self._held = self._held * _MEMORY + accepted
        self._drafted = self._drafted * _MEMORY + looked_at

    def length(self, requests: int, most: int) -> int:
        """Tokens to draft for each of so many requests, at most ``most``; 0: none."""
        if most < 1 or not self._steps:  # a plain step tells first what a draft has to beat
            return 0
        longest = self._best(requests, min(most, LONGEST))
        if longest:
            self._caught_up = 0.0
            return longest
        if self._wait:
            self._wait -= 1
            if not self._wait:  # what is seen now counts, not the text that it was turned off for
                self._held, self._drafted = self.acceptance * _PRIOR[1], _PRIOR[1]
            return 0
        if self._trials:
            self._trials -= 1
            return min(most, _TRIED[self._trials % len(_TRIED)])
        self._trials = LATER_TRIALS
        self._wait = self._worthwhile_wait(requests, min(most, LONGEST))
        self._caught_up = 0.0
        return 0

    def _best(self, requests: int, most: int) -> int:
        """The length with the highest rate of tokens, by what is known; what is not known yet looks cheap."""
        best, longest = _GAIN / self._steps.at(requests), 0
        for count in range(1, most + 1):
            rate = self._expected(count) / self._seconds(requests, count)
            if rate > best:
                best, longest = rate, count
        return longest

    def _worthwhile_wait(self, requests: int, most: int) -> int:
        """Steps after which the trials to come, if worth no more than now and begun by as much reading as the last,
        have lost their share of the time."""
        plain = self._steps.at(requests)
        lost = self._caught_up / plain
        for trial in range(LATER_TRIALS):
            count = min(most, _TRIED[trial % len(_TRIED)])
            lost += self._seconds(requests, count) / plain - self._expected(count)
        return round(min(max(lost / TRIAL_SHARE, _SHORTEST_WAIT), _LONGEST_WAIT))

    def _expected(self, count: int) -> float:
        """Tokens of a step for each request, with a draft of so many."""
        return sum(self.acceptance**held for held in range(count + 1))

    def _seconds(self, requests: int, count: int) -> float:
        """Of a step with a draft of so many tokens for each request, and of that draft."""
        return self._steps.at(requests * (1 + count)) + count * self._drafts.at(requests)


class _Times:
    """Medians of the newest seconds, by a number of tokens.

    The lower one of two: the first of a size may have packed weights or compiled something.
    """

    def __init__(self) -> None:
        self._keys: list[int] = []
        self._newest: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def note(self, key: int, seconds: float) -> None:
        if key not in self._newest:
            insort(self._keys, key)
            self._newest[key] = deque(maxlen=_SAMPLES)
        self._newest[key].append(seconds)
        self._medians[key] = median_low(self._newest[key])

    def at(self, key: int) -> float:
        """Between what was measured a line, beyond it what is nearest; 0 where nothing was."""
        if not self._keys:
            return 0.0
        index = bisect_left(self._keys, key)
        above = self._keys[min(index, len(self._keys) - 1)]
        if index in (0, len(self._keys)) or above == key:
            return self._medians[above]
        below = self._keys[index - 1]
        share = (key - below) / (above - below)
        return self._medians[below] + share * (self._medians[above] - self._medians[below])
