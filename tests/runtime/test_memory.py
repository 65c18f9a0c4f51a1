"""Sizes and budgets."""

from __future__ import annotations

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.memory import format_bytes, parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1GiB", 2**30),
        ("1.5 gib", 3 * 2**29),
        ("500MB", 500_000_000),
        ("2k", 2000),
        ("64KiB", 65536),
        ("7", 7),
        (" 12 B ", 12),
        (2**40, 2**40),
        ("1TiB", 2**40),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "1 XB", "1e9", "1,5GB", -5, True])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("25%", 4000), (" 12.5 %", 2000), ("100%", 16000), ("1k", 1000), (7, 7)]
)
def test_budgets(text: str | int, expected: int) -> None:
    assert parse_budget(text).within(lambda: 16000) == expected


@pytest.mark.parametrize("text", ["0", 0, "0%", "101%", "-1", "-5%", "lots", "", "%", True])
def test_what_is_no_budget(text: str | int) -> None:
    with pytest.raises(ConfigError, match=r"is not a size|is no memory budget"):
        parse_budget(text)


def test_a_share_of_what_is_not_known() -> None:
    def never() -> int:
        raise AssertionError("a size needs no measure")

    assert parse_budget("1GiB").within(never) == 2**30
    with pytest.raises(ConfigError, match=r"50% of what\? This device does not tell its memory"):
        parse_budget("50%").within(lambda: None)


def test_sizes_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * 2**19, 3 * 2**29)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "1.50 GiB",
    ]
