"""Rows of a dense cache: the bookkeeping against a plain list that is moved as the pool says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.row_pool import Move, RowPool, Window

ROWS = 6


def filled(*keys: int) -> RowPool:
    pool = RowPool(ROWS)
    for key in keys:
        pool.open(key)
    return pool


def unit(key: int) -> int:
    return 1


def test_lowest_free_row_first() -> None:
    pool = filled(10, 11, 12)
    assert [pool.row(key) for key in (10, 11, 12)] == [0, 1, 2]
    assert pool.close(11) == 1
    assert pool.open(13) == 1
    assert len(pool) == 3


def test_refuses_what_cannot_be() -> None:
    pool = filled(*range(ROWS))
    with pytest.raises(LookupError, match="all 6 rows"):
        pool.open(99)
    pool.close(0)
    with pytest.raises(ValueError, match="has row 1"):
        pool.open(1)
    with pytest.raises(KeyError):
        pool.close(0)


def test_neighbours_stay() -> None:
    assert filled(0, 1, 2, 3).arrange([2, 1], unit) == Window(1, 2, ())


def test_idle_rows_are_tolerated_up_to_the_limit() -> None:
    pool = filled(0, 1, 2, 3)
    assert pool.arrange([0, 2], unit, idle=1) == Window(0, 3, ())
    assert pool.arrange([0, 2], unit, idle=0).moves != ()


def test_a_free_row_is_moved_into() -> None:
    pool = filled(0, 1, 2)
    pool.close(1)
    assert pool.arrange([0, 2], {0: 100, 2: 1}.__getitem__) == Window(0, 2, (Move(2, 1, exchange=False),))
    assert pool.row(2) == 1


def test_the_dear_one_stays_and_a_parked_one_gives_way() -> None:
    pool = filled(0, 1, 2)
    pool.open(3)
    window = pool.arrange([0, 3], {0: 1, 1: 5, 2: 5, 3: 100}.__getitem__)
    assert (window.first, window.count) == (3, 2)
    assert window.moves == (Move(0, 4, exchange=False),)
    full = filled(*range(ROWS))
    window = full.arrange([0, 5], [1, 9, 9, 9, 2, 100].__getitem__)
    assert window == Window(4, 2, (Move(0, 4, exchange=True),))
    assert (full.row(0), full.row(4)) == (4, 0)


@given(st.data())
def test_contents_follow_their_keys(data: st.DataObject) -> None:
    pool = RowPool(ROWS)
    memory: list[int | None] = [None] * ROWS
    open_keys: list[int] = []
    for key in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["open", "open", "close", "arrange"]))
        if action == "open" and len(open_keys) < ROWS:
            memory[pool.open(key)] = key
            open_keys.append(key)
        elif action == "close" and open_keys:
            closed = data.draw(st.sampled_from(open_keys))
            memory[pool.close(closed)] = None
            open_keys.remove(closed)
        elif action == "arrange" and open_keys:
            batch = data.draw(st.sets(st.sampled_from(open_keys), min_size=1))
            idle = data.draw(st.integers(0, 2))
            window = pool.arrange(batch, lambda key: key % 3, idle)
            for move in window.moves:
                assert (memory[move.target] is not None) == move.exchange
                memory[move.source], memory[move.target] = memory[move.target], memory[move.source]
            inside = set(range(window.first, window.first + window.count))
            assert {pool.row(member) for member in batch} <= inside
            assert len(batch) <= window.count <= len(batch) + idle
        pool.check_integrity()
        assert all(memory[pool.row(each)] == each for each in open_keys)
