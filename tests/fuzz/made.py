"""Structures that hypothesis makes up, rather than ones that were valid once."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

COUNT = 200
"""Of each seed."""
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=20)
    | st.text(st.characters(categories=["Cs", "Cc", "Co", "Zl"]), max_size=4),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
"""Values of JSON's types, with what JSON itself does not have: NaN, and halves of surrogate pairs."""


@cache
def pool(number: int) -> list[Any]:
    """Examples that inputs draw from, always the same for a seed ``number``."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=COUNT,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(JSON)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found
