"""What a KV cache may be made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from devices.errors import DeviceUnavailable

KVType = Literal["float32", "float16", "int8"]
"""``float16``: bfloat16 where the graph was made for it. ``int8``: 8-bit integers with scales, in whatever way is the
engine's own."""


KVWish = KVType | Literal["auto"]
"""``auto``: for each request what suits it, where the device can (:mod:`edge_runtime.precision`)."""


def choose_kv_type(device: str, wanted: KVWish | None, possible: Sequence[KVType]) -> KVType:
    """``wanted``; None and ``auto``: the first of ``possible``. DeviceUnavailable if ``device`` has no such cache."""
    if wanted is None or wanted == "auto":
        return possible[0]
    if wanted not in possible:
        raise DeviceUnavailable(
            f"{device} keeps keys and values as {' or '.join(possible)}, not {wanted}; leave the type of the KV cache "
            "open, or take another device"
        )
    return wanted
