"""Who answers a request, and why: what the headers, ``edge-glm route`` and the Python objects tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TIER_HEADER = "x-edge-glm-tier"
ROUTE_HEADER = "x-edge-glm-route"
_LONGEST = 300
"""Characters of a text in a header."""

Signal = float | str | None


@dataclass
class Route:
    """Of one request; filled in as it becomes known, and whole once the answer has ended."""

    request: str
    """Its id."""
    task_class: str
    because: str
    """Why it is of that class."""
    order: tuple[str, ...]
    """Tiers that may take it, best first."""
    reasons: dict[str, str]
    """For every tier: why it is in ``order``, or why not, or how it failed."""
    wanted_ttft_ms: float | None = None
    """To the first token, as its class wants it; None: no matter."""
    wanted_total_ms: float | None = None
    """The whole answer likewise."""
    signals: Mapping[str, Signal] = field(default_factory=dict)
    good: float | None = None
    """P(the local answer is good enough), as last estimated."""
    tier: str = ""
    """Who answers; empty: not decided yet."""
    reason: str = ""
    degraded: str | None = None
    """Why a tier answers that would not have been chosen."""
    continued: str | None = None
    """Why a local model went on with the answer of another tier."""

    def headers(self) -> dict[str, str]:
        """As of HTTP; the route is a dictionary of structured fields (RFC 9651)."""
        fields = {
            "class": self.task_class,
            "reason": self.reason,
            "degraded": self.degraded,
            "continued": self.continued,
        }
        parts = [f"{name}={_string(value)}" for name, value in fields.items() if value]
        if self.good is not None:
            parts.insert(1, f"good={self.good:.3f}")
        return {TIER_HEADER: self.tier, ROUTE_HEADER: ", ".join(parts)}


def only_local(request: str = "") -> Route:
    """Where there is no policy."""
    return Route(request, "", "there is no policy", ("local",), {}, tier="local", reason="there is no other tier")


def _string(value: str) -> str:
    shown = "".join(each if " " <= each <= "~" else "?" for each in value)[:_LONGEST]
    return '"' + shown.replace("\\", "\\\\").replace('"', '\\"') + '"'
