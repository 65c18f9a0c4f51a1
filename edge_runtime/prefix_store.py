"""Prefixes on disk: the KV cache of prompts seen before, which survives a restart.

A prefix is kept in segments of :data:`SEGMENT` tokens, a safetensors file each, named by a hash over everything that
decides its values: the caller's fingerprint of model and engine, and all tokens up to its end. So prompts that begin
alike share their first segments, a longer prompt adds only its new ones, and a changed model finds nothing. (Chained
block hashes: vLLM, "Automatic Prefix Caching".) Files hold no text, but what the model made of it: they are for their
owner's eyes only.

A store never fails a request. What cannot be read is deleted and computed again; when writing fails, the store says so
once in the log and writes no more.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import queue
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from devices.base import SNAPSHOT_STEP, Decoder, DecoderOptions, Engine, Snapshot
from devices.kept_files import make_room, write_whole
from edge_runtime.package import Variant
from edge_runtime.request import PLAIN, Kind
from edge_runtime.version import installed

SEGMENT = SNAPSHOT_STEP
"""Tokens of a file: 3.4 MB on OpenVINO and 11.8 MB on ONNX Runtime with SmolLM2-135M."""
_SUFFIX = ".safetensors"
DEFAULT_SIZE = "1GiB"
"""Of all models' prefixes together."""
QUEUED = 1
"""Segments that may wait to be written; more would only pile up in memory."""

_ONNXRUNTIME = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-webgpu", "onnxruntime-ep-openvino")
_COMPUTED_BY: dict[Engine, tuple[str, ...]] = {
    "onnxruntime": _ONNXRUNTIME,
    "onnxruntime-coreml": _ONNXRUNTIME,
    "onnxruntime-cuda": _ONNXRUNTIME,
    "onnxruntime-edge": (*_ONNXRUNTIME, "edge-glm"),
    "openvino": ("openvino",),
    "openvino-npu": ("openvino",),
}
"""Distributions whose versions decide what a segment's bytes are."""

_log = logging.getLogger("edge_glm.prefixes")


class PrefixStore:
    """Segments of one model in ``folder``. Reading belongs to one thread; files are written by another of its own.

    Any number of processes may share the folder: files appear whole, under a name that says what they hold, and one
    that has gone is merely unknown.
    """

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int, root: Path | None = None) -> None:
        """``fingerprint``: model, engine and KV layout. ``max_bytes``: of all files under ``root`` (None: ``folder``),
        where other models have theirs; the least recently used go first.
        """
        self._folder = folder
        self._root = folder if root is None else root
        self._seed = hashlib.sha256(fingerprint.encode()).digest()
        self._max_bytes = max_bytes
        self._queue: queue.Queue[tuple[int, str, Snapshot] | None] = queue.Queue(QUEUED)
        self._writer: threading.Thread | None = None
        self._failed = False

    @property
    def writable(self) -> bool:
        """False after a failed write, such as on a full disk."""
        return not self._failed

    def names(self, tokens: Sequence[int], kind: Kind = PLAIN) -> Iterator[str]:
        """Of the whole segments of ``tokens``, first to last."""
        name = self._seed + repr(tuple(kind)).encode()
        for start in range(0, len(tokens) - SEGMENT + 1, SEGMENT):
            segment = np.asarray(tokens[start : start + SEGMENT], "<i8")
            name = hashlib.sha256(name + segment.tobytes()).digest()
            yield name.hex()

    def touch(self, place: int, name: str) -> bool:
        """Whether segment number ``place`` of a prefix is there; marks it as used."""
        try:
            _mark(self._path(name), place)
        except OSError:
            return False
        return True

    def load(self, name: str) -> Snapshot | None:
        """The segment; None if it is not there or not as it was written."""
        path = self._path(name)
        try:
            return _read(path)
        except OSError:  # gone
            return None
        except Exception as error:  # whatever a damaged file makes its parser raise
            _log.warning("prefix %s is damaged and is deleted: %s", path, error)
            self.discard(name)
            return None

    def discard(self, name: str) -> None:
        with suppress(OSError):
            self._path(name).unlink()

    def save(self, place: int, name: str, snapshot: Snapshot, timeout: float = 0) -> bool:
        """Have segment number ``place`` of a prefix written; False if too much is waiting, also after ``timeout``
        seconds. The arrays belong to the store from now on.
        """
        if self._failed:
            return True  # there is nothing to wait for
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="edge-glm prefix store", daemon=True)
            self._writer.start()
        try:
            self._queue.put((place, name, snapshot), block=timeout > 0, timeout=timeout)
        except queue.Full:
            return False
        return True

    def close(self) -> None:
        """Write what waits. Idempotent."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._queue.put(None)
            writer.join()

    # --- the writer's thread ------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failed:
                continue
            try:
                self._write(*item)
            except Exception as error:
                self._failed = True
                _log.warning("prefixes are no longer written to %s: %s", self._folder, error)

    def _write(self, place: int, name: str, snapshot: Snapshot) -> None:
        path = self._path(name)
        data = _encode(snapshot)
        if path.exists() or not make_room(self._root, _SUFFIX, len(data), self._max_bytes):
            return
        write_whole(path, data)
        _mark(path, place)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"


def fingerprint(variant: Variant, decoder: Decoder, options: DecoderOptions) -> str:
    """Everything but the tokens that decides what a segment's bytes are and mean."""
    limits = decoder.limits
    return repr(
        (
            [(entry.path, entry.sha256) for entry in variant.files],
            installed(_COMPUTED_BY[variant.engine]),
            (decoder.device, platform.machine(), limits.kv_bytes_per_token, limits.kv_block),
            (options.batch_invariant, sorted(options.properties.items())),
        )
    )


def _mark(path: Path, place: int) -> None:
    """Used now; later segments seem a little older, for they are worth nothing without the earlier ones."""
    when = time.time_ns() - place * 10**9
    os.utime(path, ns=(when, when))


def _encode(snapshot: Snapshot) -> bytes:
    from safetensors.numpy import save

    arrays = {str(index): np.ascontiguousarray(array) for index, array in enumerate(snapshot.arrays)}
    metadata = {"start": str(snapshot.start), "length": str(snapshot.length), "crc32": str(_checksum(snapshot))}
    data: bytes = save(arrays, metadata)
    return data


def _read(path: Path) -> Snapshot:
    """OSError; ValueError, SafetensorError, … unless it is as it was written."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        arrays = tuple(file.get_tensor(str(index)) for index in range(len(file.keys())))
    snapshot = Snapshot(int(metadata["length"]), arrays, int(metadata["start"]))
    if _checksum(snapshot) != int(metadata["crc32"]):
        raise ValueError("its checksum is wrong")
    return snapshot


def _checksum(snapshot: Snapshot) -> int:
    checksum = zlib.crc32(f"{snapshot.start} {snapshot.length}".encode())
    for array in snapshot.arrays:
        checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    return checksum
