"""Blocks of KV cache, shared between sequences by reference count; engine-free bookkeeping.

The scheme of PagedAttention (Kwon et al. 2023, arXiv 2309.06180): the cache is an array of blocks of ``block_size``
tokens; a sequence is a table of block ids and a length. Sequences with a common prefix name the same blocks, so that
forking and cropping move no data. Only a block that is both shared and about to be written is copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from devices.errors import OutOfKVCache


@dataclass(eq=False)
class BlockTable:
    """One sequence: ``blocks[i]`` holds tokens ``i · block_size …``. Changed only by its :class:`BlockPool`."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


class Copy(NamedTuple):
    """Block ``source`` must be copied to ``target`` before the next write."""

    source: int
    target: int


class BlockPool:
    """``num_blocks`` blocks with ids 0 … num_blocks − 1, and who uses them.

    A block is free exactly when no table names it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, not {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._users = [0] * num_blocks
        # taken from the end: low ids first, so that memory committed on first touch stays small
        self._free = list(range(num_blocks - 1, -1, -1))
        self._touched: set[int] = set()
        """Blocks that were used since their memory was last given back."""

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def append(self, growth: Sequence[tuple[BlockTable, int]]) -> list[Copy]:
        """Lengthen each table by its number of tokens; returns the block copies that must come first.

        All or nothing: OutOfKVCache when the blocks do not suffice, and then nothing has changed.
        """
        needed = self._needed(growth)
        if needed > len(self._free):
            tokens = sum(count for _, count in growth)
            raise OutOfKVCache(
                f"{tokens} more tokens need {needed} blocks of {self.block_size} tokens; {len(self._free)} of "
                f"{self.num_blocks} are free: close or crop sequences, or open the device with more kv_tokens"
            )
        copies = []
        for table, count in growth:
            copy = self._own_last(table) if count else None
            if copy is not None:
                copies.append(copy)
            table.length += count
            while len(table.blocks) * self.block_size < table.length:
                table.blocks.append(self._take())
        return copies

    def crop(self, table: BlockTable, length: int) -> None:
        """Keep the first ``length`` tokens. ValueError if that is negative or above the present length."""
        self._check_length(table, length)
        keep = self._blocks_for(length)
        for block in table.blocks[keep:]:
            self._release(block)
        del table.blocks[keep:]
        table.length = length

    def fork(self, table: BlockTable, length: int) -> BlockTable:
        """A table over the same first ``length`` tokens; copies nothing. ValueError as for :meth:`crop`."""
        self._check_length(table, length)
        shared = table.blocks[: self._blocks_for(length)]
        for block in shared:
            self._users[block] += 1
        return BlockTable(shared, length)

    def take_idle(self) -> list[range]:
        """Blocks that were used and are free now, as runs of neighbours; each is named once, until it is used again."""
        idle = sorted(block for block in self._touched if not self._users[block])
        self._touched.difference_update(idle)
        runs: list[range] = []
        for block in idle:
            if runs and runs[-1].stop == block:
                runs[-1] = range(runs[-1].start, block + 1)
            else:
                runs.append(range(block, block + 1))
        return runs

    def check_integrity(self, tables: Collection[BlockTable]) -> None:
        """Raise AssertionError unless ``tables`` are all the users, and every other block is free."""
        users = Counter(block for table in tables for block in table.blocks)
        for table in tables:
            if len(table.blocks) != self._blocks_for(table.length):
                raise AssertionError(f"{table.length} tokens in {len(table.blocks)} blocks of {self.block_size}")
            if len(set(table.blocks)) != len(table.blocks):
                raise AssertionError(f"a block twice in one table: {table.blocks}")
        wrong = [block for block, count in enumerate(self._users) if users[block] != count]
        if wrong:
            raise AssertionError(
                f"blocks {wrong} are counted {[self._users[b] for b in wrong]} times, "
                f"used {[users[b] for b in wrong]} times"
            )
        unused = {block for block, count in enumerate(self._users) if count == 0}
        if len(self._free) != len(unused) or set(self._free) != unused:
            raise AssertionError(f"free list {sorted(self._free)} is not the unused blocks {sorted(unused)}")

    def _needed(self, growth: Sequence[tuple[BlockTable, int]]) -> int:
        """Free blocks that :meth:`append` will take, copies included."""
        needed = 0
        copied: dict[int, int] = {}
        for table, count in growth:
            if count == 0:
                continue
            needed += self._blocks_for(table.length + count) - len(table.blocks)
            if self._last_is_partial(table):
                last = table.blocks[-1]
                # of n users, the first n − 1 writers copy; the one left over owns the block
                if self._users[last] - copied.get(last, 0) > 1:
                    needed += 1
                    copied[last] = copied.get(last, 0) + 1
        return needed

    def _own_last(self, table: BlockTable) -> Copy | None:
        if not self._last_is_partial(table) or self._users[table.blocks[-1]] == 1:
            return None
        source, target = table.blocks[-1], self._take()
        table.blocks[-1] = target
        self._release(source)
        return Copy(source, target)

    def _last_is_partial(self, table: BlockTable) -> bool:
        return table.length % self.block_size != 0

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)

    def _check_length(self, table: BlockTable, length: int) -> None:
        if not 0 <= length <= table.length:
            raise ValueError(f"length {length} is not within 0..{table.length}, the tokens held")

    def _take(self) -> int:
        block = self._free.pop()
        self._users[block] = 1
        self._touched.add(block)
        return block

    def _release(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            self._free.append(block)
