"""Sizes and budgets."""

from __future__ import annotations

import pytest

from edge_runtime.errors import BudgetError, ConfigError
from edge_runtime.memory import MemoryBudget, format_bytes, parse_budget, parse_bytes


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


def test_reservations_add_up() -> None:
    budget = MemoryBudget(1000)
    budget.reserve("base", 100)
    budget.reserve("weights", 600)
    budget.reserve("base", 50)
    assert budget.left == 250
    assert dict(budget.reserved) == {"base": 150, "weights": 600}
    assert budget.release("base") == 150
    assert budget.release("base") == 0
    assert budget.left == 400


def test_a_refusal_says_what_would_do() -> None:
    budget = MemoryBudget(1024)
    budget.reserve("weights", 1000)
    with pytest.raises(BudgetError, match=r"kv needs 100 B.* 24 B are left \(weights 1000 B\).* 1.1 KiB would do"):
        budget.reserve("kv", 100)
    assert budget.left == 24
    with pytest.raises(BudgetError, match="0 bytes"):
        MemoryBudget(0)


def test_kv_tokens() -> None:
    budget = MemoryBudget(10_000)
    budget.reserve("weights", 4_000)
    assert budget.kv_tokens_for(10, at_least=100, at_most=10_000) == 600
    assert budget.kv_tokens_for(10, at_least=100, at_most=512) == 512
    with pytest.raises(BudgetError, match=r"601 tokens .* enough for 600 tokens; .* a budget of 9.8 KiB"):
        budget.kv_tokens_for(10, at_least=601, at_most=601)
    assert budget.left == 6_000
