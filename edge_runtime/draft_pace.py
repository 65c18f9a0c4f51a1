"""How many tokens are worth drafting: by what steps and drafts have taken here, and how many drafted tokens have held.

The expected tokens of a step with a draft of k are ``1 + a + … + a^k``, where ``a`` is the share of drafted tokens that
hold (Leviathan et al. 2023, arXiv 2211.17192); its time is that of one step of ``1 + k`` tokens and of k of the draft.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
FIRST_WAIT, LONGEST_WAIT = 64, 4096
"""Steps without a draft after none was worth it, until it is looked at again; twice as many each time."""


class DraftPace:
    """Seconds and tokens in, the length of the next draft out."""

    def __init__(self) -> None:
        self._steps: dict[int, float] = {}
        self._drafts: dict[int, float] = {}
        self._held, self._drafted = _PRIOR
        self._wait = 0
        self._next_wait = FIRST_WAIT

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
        _note(self._steps, tokens, seconds)

    def draft_took(self, requests: int, seconds: float) -> None:
        """A step of the draft, a token for each of so many requests."""
        _note(self._drafts, requests, seconds)

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
        if most < 1:
            return 0
        step, draft = _estimate(self._steps), _estimate(self._drafts)
        best, longest = step(requests) and 1 / step(requests), 0
        if not best:  # no step was measured yet: one plain step tells what a draft has to beat
            return 0
        for count in range(1, min(most, LONGEST) + 1):
            expected = sum(self.acceptance**power for power in range(count + 1))
            rate = expected / max(step(requests * (1 + count)) + count * draft(requests), 1e-9)
            if rate > best * (_GAIN if longest == 0 else 1):
                best, longest = rate, count
        if longest:
            self._next_wait = FIRST_WAIT
        elif self._drafts:
            self._wait, self._next_wait = self._next_wait, min(2 * self._next_wait, LONGEST_WAIT)
        return longest


def _note(times: dict[int, float], key: int, seconds: float) -> None:
    before = times.get(key)
    times[key] = seconds if before is None else before + _WEIGHT * (seconds - before)


def _estimate(times: Mapping[int, float]) -> Callable[[int], float]:
    """Between what was measured a line, beyond it what is nearest: what is not known is tried. Nothing known: 0."""
    known = sorted(times.items())

    def at(key: int) -> float:
        below = [each for each in known if each[0] <= key]
        above = [each for each in known if each[0] >= key]
        if not below or not above:
            return (below[-1:] + above[:1])[0][1] if known else 0.0
        (low, first), (high, second) = below[-1], above[0]
        return first if low == high else first + (second - first) * (key - low) / (high - low)

    return at
