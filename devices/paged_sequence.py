"""A sequence that is a block table in its decoder's pool (:mod:`devices.block_pool`)."""

from __future__ import annotations

from typing import Protocol

from devices.base import Snapshot
from devices.block_pool import BlockTable
from devices.errors import DeviceError
from devices.kv_pool import KVPool
from devices.steps import snapshot_stop


class PagedHost(Protocol):
    """The decoder, as its sequences see it."""

    def check_open(self) -> None:
        """DeviceError when the decoder is closed."""

    def fork(self, sequence: PagedSequence, length: int) -> PagedSequence: ...

    def restore(self, sequence: PagedSequence, snapshot: Snapshot) -> None: ...

    def forget(self, sequence: PagedSequence, table: BlockTable) -> None:
        """Take back a closing sequence's blocks."""


class PagedSequence:
    """See :class:`devices.base.DecoderSequence`."""

    def __init__(self, decoder: PagedHost, pool: KVPool, table: BlockTable, on_long: bool) -> None:
        self.decoder = decoder
        self.pool = pool
        self._open_table: BlockTable | None = table
        self.on_long = on_long
        """On the long rotary factors (longrope)."""

    @property
    def table(self) -> BlockTable:
        """DeviceError when the sequence or its decoder is closed."""
        if self._open_table is None:
            raise DeviceError("the sequence is closed; open a new one")
        self.decoder.check_open()
        return self._open_table

    @property
    def length(self) -> int:
        return self.table.length

    @property
    def nbytes(self) -> int:
        return len(self.table.blocks) * self.pool.storage.block_bytes

    def crop(self, length: int) -> int:
        self.pool.blocks.crop(self.table, length)
        return length

    def fork(self, length: int) -> PagedSequence:
        return self.decoder.fork(self, length)

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot:
        stop, size = snapshot_stop(start, stop, self.length), self.pool.blocks.block_size
        blocks = self.table.blocks[start // size : -(-stop // size)]
        return Snapshot(stop - start, self.pool.storage.read(blocks, stop - start), start)

    def restore(self, snapshot: Snapshot) -> None:
        self.decoder.restore(self, snapshot)

    def close(self) -> None:
        table, self._open_table = self._open_table, None
        if table is not None:
            self.decoder.forget(self, table)
