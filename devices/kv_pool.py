"""A pool of KV blocks: who uses which (:mod:`devices.block_pool`), and the memory behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from devices.block_pool import BlockPool
from devices.kv_types import KVType


class KVStorage(Protocol):
    """Memory of blocks, on whatever device."""

    @property
    def block_bytes(self) -> int:
        """Of one block, over all layers."""

    def read(self, blocks: list[int], tokens: int) -> tuple[NDArray[np.generic], ...]:
        """Copies of what the blocks hold of ``tokens`` tokens: keys and values, layer by layer."""

    def form(self, tokens: int) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of each array that :meth:`read` gives of ``tokens`` tokens."""

    def write(self, blocks: list[int], arrays: tuple[NDArray[np.generic], ...]) -> None:
        """What :meth:`read` gave, into other blocks."""

    def copy(self, source: int, target: int) -> None:
        """One block to another, in every layer, before the next inference."""

    def release(self, blocks: range) -> None:
        """Give back the memory of these, which nobody uses, where that can be. They may be used again."""


@dataclass(frozen=True, eq=False)
class KVPool:
    """Blocks of one type."""

    blocks: BlockPool
    storage: KVStorage
    kv_type: KVType | None = None
    """None: the device has one type, whatever it is."""

    @property
    def bytes_per_token(self) -> int:
        return -(-self.storage.block_bytes // self.blocks.block_size)
