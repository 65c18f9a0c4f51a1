"""The block pool against a naive twin that copies everything, and its corners."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from devices.block_pool import BlockPool, BlockTable, Copy
from devices.errors import OutOfKVCache
from devices.kv_blocks import KVBlocks

BLOCK = 4


def grown(pool: BlockPool, length: int) -> BlockTable:
    table = BlockTable()
    pool.append([(table, length)])
    return table


class TestAppend:
    def test_takes_whole_blocks_and_fills_the_last(self) -> None:
        pool = BlockPool(8, BLOCK)
        table = grown(pool, 5)
        assert (len(table.blocks), table.length, pool.free_blocks) == (2, 5, 6)
        assert pool.append([(table, 3)]) == []
        assert (len(table.blocks), pool.free_blocks) == (2, 6)

    def test_is_all_or_nothing(self) -> None:
        pool = BlockPool(3, BLOCK)
        first, second = BlockTable(), BlockTable()
        with pytest.raises(OutOfKVCache, match=r"13 more tokens need 4 blocks of 4 tokens; 3 of 3 are free"):
            pool.append([(first, 8), (second, 5)])
        assert (first, first.blocks, first.length, second.length) == (first, [], 0, 0)
        assert pool.free_blocks == 3
        pool.check_integrity([first, second])

    def test_a_shared_partial_block_is_copied_once_per_extra_writer(self) -> None:
        pool = BlockPool(4, BLOCK)
        table = grown(pool, 6)
        forks = [pool.fork(table, 6), pool.fork(table, 6)]
        old = table.blocks[1]
        copies = pool.append([(table, 1), (forks[0], 1), (forks[1], 1)])
        # three users of one block: two copies, and the last writer keeps it; that takes exactly the two free blocks
        assert [copy.source for copy in copies] == [old, old]
        assert forks[1].blocks[1] == old
        assert len({t.blocks[1] for t in (table, *forks)}) == 3
        assert len({t.blocks[0] for t in (table, *forks)}) == 1
        assert pool.free_blocks == 0
        pool.check_integrity([table, *forks])

    def test_a_shared_partial_block_needs_room_for_its_copy(self) -> None:
        pool = BlockPool(2, BLOCK)
        table = grown(pool, 6)
        fork = pool.fork(table, 6)
        with pytest.raises(OutOfKVCache):
            pool.append([(fork, 1)])
        pool.check_integrity([table, fork])
        pool.crop(table, 4)
        assert pool.append([(fork, 1)]) == []  # alone now: nothing to copy
        pool.check_integrity([table, fork])

    def test_a_shared_full_block_is_not_copied(self) -> None:
        pool = BlockPool(3, BLOCK)
        table = grown(pool, 4)
        fork = pool.fork(table, 4)
        assert pool.append([(table, 1), (fork, 1)]) == []
        assert table.blocks[0] == fork.blocks[0]
        assert table.blocks[1] != fork.blocks[1]

    def test_a_full_block_cropped_into_and_shared_is_copied(self) -> None:
        pool = BlockPool(3, BLOCK)
        table = grown(pool, 4)
        fork = pool.fork(table, 3)
        copies = pool.append([(fork, 1)])
        assert copies == [Copy(table.blocks[0], fork.blocks[0])]


class TestCropAndFork:
    def test_crop_gives_blocks_back(self) -> None:
        pool = BlockPool(4, BLOCK)
        table = grown(pool, 13)
        pool.crop(table, 5)
        assert (len(table.blocks), table.length, pool.free_blocks) == (2, 5, 2)
        pool.crop(table, 0)
        assert pool.free_blocks == 4

    def test_fork_copies_nothing_and_outlives_its_parent(self) -> None:
        pool = BlockPool(4, BLOCK)
        table = grown(pool, 16)
        fork = pool.fork(table, 9)
        assert fork.blocks == table.blocks[:3]
        assert pool.free_blocks == 0
        pool.crop(table, 0)
        assert pool.free_blocks == 1
        pool.check_integrity([table, fork])

    @pytest.mark.parametrize("length", [-1, 6])
    def test_lengths_outside_are_refused(self, length: int) -> None:
        pool = BlockPool(4, BLOCK)
        table = grown(pool, 5)
        with pytest.raises(ValueError, match=r"not within 0\.\.5"):
            pool.crop(table, length)
        with pytest.raises(ValueError, match=r"not within 0\.\.5"):
            pool.fork(table, length)


class TestIntegrity:
    def test_a_table_nobody_names_is_found(self) -> None:
        pool = BlockPool(4, BLOCK)
        grown(pool, 5)
        with pytest.raises(AssertionError, match="counted"):
            pool.check_integrity([])

    def test_a_table_longer_than_its_blocks_is_found(self) -> None:
        pool = BlockPool(4, BLOCK)
        table = grown(pool, 5)
        table.length = 9
        with pytest.raises(AssertionError, match="9 tokens in 2 blocks"):
            pool.check_integrity([table])


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_empty_pools_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(*sizes)


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_sequences_that_own_their_tokens(seed: int) -> None:
    """Random growth, crops, forks and closings; the contents of the blocks are those of plain lists."""
    random = np.random.default_rng(seed)
    pool = BlockPool(24, BLOCK)
    memory = np.full((24, BLOCK), -1)
    live: list[tuple[BlockTable, list[int]]] = [(BlockTable(), [])]
    stamp, refused = 0, 0
    for _ in range(400):
        action = random.integers(5)
        table, tokens = live[random.integers(len(live))]
        if action <= 1:
            chosen = [live[i] for i in random.permutation(len(live))[: random.integers(1, len(live) + 1)]]
            growth = [(t, int(random.integers(1, 7))) for t, _ in chosen]
            try:
                copies = pool.append(growth)
            except OutOfKVCache:
                refused += 1
                continue
            for source, target in copies:
                memory[target] = memory[source]
            for (grown_table, count), (_, own) in zip(growth, chosen, strict=True):
                for position in range(grown_table.length - count, grown_table.length):
                    memory[grown_table.blocks[position // BLOCK], position % BLOCK] = stamp
                    own.append(stamp)
                    stamp += 1
        elif action == 2:
            length = int(random.integers(len(tokens) + 1))
            pool.crop(table, length)
            del tokens[length:]
        elif action == 3 and len(live) < 6:
            length = int(random.integers(len(tokens) + 1))
            live.append((pool.fork(table, length), tokens[:length]))
        elif len(live) > 1:
            pool.crop(table, 0)
            live = [entry for entry in live if entry[0] is not table]
        pool.check_integrity([t for t, _ in live])
        for t, own in live:
            assert memory[t.blocks].reshape(-1)[: t.length].tolist() == own
    assert refused > 0  # the pool was small enough to run out


class TestIdle:
    def test_what_was_used_and_is_free_is_named_once(self) -> None:
        pool = BlockPool(8, BLOCK)
        first, second, third = grown(pool, 8), grown(pool, 4), grown(pool, 8)
        assert pool.take_idle() == []
        pool.crop(first, 0)
        pool.crop(third, 4)
        assert pool.take_idle() == [range(2), range(4, 5)]
        assert pool.take_idle() == []
        again = grown(pool, 4)
        assert pool.take_idle() == []
        pool.crop(again, 0)
        assert sum(map(len, pool.take_idle())) == 1
        pool.check_integrity([first, second, third, again])


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system takes no pages back")
def test_released_blocks_are_zero_and_their_neighbours_as_they_were() -> None:
    blocks = KVBlocks(blocks=9, block_size=4, layers=3, kv_heads=1, head_bytes=1000)  # 6,000 bytes: not whole pages
    blocks.values[:] = 7
    blocks.release(range(2, 6))
    assert (blocks.values[[0, 1, 6, 7, 8]] == 7).all()
    zeros = int((blocks.values == 0).sum())
    assert 4 * 6000 - 2 * mmap.PAGESIZE < zeros <= 4 * 6000
    assert zeros % mmap.PAGESIZE == 0
    blocks.release(range(8, 9))  # to the very end
    assert (blocks.values[8].ravel()[-1], blocks.values[7, 0, 0, 0, 0]) == (0, 7)
