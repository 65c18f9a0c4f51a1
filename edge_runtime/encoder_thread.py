"""A sentence encoder's thread: batch after batch, and who waits is told where one fails, gives no numbers or hangs."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from devices.encoder import Encoder
from edge_runtime.errors import EngineError, EngineStopped, StepTimeout
from edge_runtime.heartbeat import HEARTBEAT, Heartbeat
from edge_runtime.step_watch import Abandoned, StepPace, StepWatch

CLOSING_S = 5.0
"""So long closing waits for the batch that runs."""
_CLOSED = "the encoder was closed"
_log = logging.getLogger("edge_glm.encoder")
Vectors = NDArray[np.float32]


class EncoderThread:
    """Owns its encoder. Methods may be called from any thread.

    ``device``: its name. ``step_timeout``: seconds that each batch may take at least, more where batches were slow
    (:mod:`edge_runtime.step_watch`); None: whatever it takes. One that takes longer ends all that wait: no other device
    has this model open.
    """

    def __init__(
        self, encoder: Encoder, device: str, step_timeout: float | None, heartbeat: Heartbeat = HEARTBEAT
    ) -> None:
        self.failure: str | None = None
        """Why it embeds no more, though nobody has closed it."""
        self._encoder = encoder
        self._device = device
        self._watch = StepWatch(float("inf") if step_timeout is None else step_timeout, heartbeat, self._give_up)
        self._pace = StepPace(self._watch.least)
        self._changed = threading.Condition()
        """Guards what follows."""
        self._asked: deque[tuple[Future[Vectors], Sequence[Sequence[int]]]] = deque()
        self._running: Future[Vectors] | None = None
        self._closed = False
        self._settled = threading.Event()
        """Nobody waits, and the encoder is closed or given up."""
        threading.Thread(target=self._run, name="edge-glm encoder", daemon=True).start()

    @property
    def alive(self) -> bool:
        return not self._closed and self.failure is None

    def embed(self, texts: Sequence[Sequence[int]]) -> Vectors:
        """As :meth:`devices.encoder.Encoder.embed`; EngineError also for what are no numbers; StepTimeout;
        EngineStopped."""
        asked: Future[Vectors] = Future()
        with self._changed:
            if not self.alive:
                raise EngineStopped(self.failure or _CLOSED)
            self._asked.append((asked, texts))
            self._changed.notify()
        return asked.result()

    def close(self) -> None:
        """Free the model, once the batch that runs has ended; it is not waited for long. Who waits for another gets
        EngineStopped. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._watch.hurry(CLOSING_S)
        self._settled.wait()

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                asked, texts = job
                try:
                    with self._watch.step(self._device, sum(map(len, texts)), self._pace):
                        vectors = self._encoder.embed(texts)
                    if not np.isfinite(vectors).all():
                        raise EngineError(f"{self._device} gave no numbers for a text")
                except Exception as error:  # its own: the next may be sound
                    asked.set_exception(error)
                else:
                    asked.set_result(vectors)
        except Abandoned:
            _log.warning("%s has come back, and is closed", self._device)
        self._close_encoder()
        self._watch.close()
        self._settled.set()

    def _next(self) -> tuple[Future[Vectors], Sequence[Sequence[int]]] | None:
        """None: it is to be closed."""
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._asked or self._closed)
            if self._closed:
                self._end(EngineStopped(_CLOSED))
                return None
            job = self._asked.popleft()
            self._running = job[0]
        return job

    def _give_up(self, error: StepTimeout) -> None:
        """On a thread of its own: the encoder's hangs."""
        _log.error("%s", error)
        with self._changed:
            if not self._closed:
                self.failure = f"{error}, and no other device has this model: start the program anew"
            if self._running is not None:
                self._running.set_exception(error)
            self._end(EngineStopped(self.failure or _CLOSED))
        self._settled.set()

    def _end(self, error: EngineStopped) -> None:
        while self._asked:
            self._asked.popleft()[0].set_exception(error)

    def _close_encoder(self) -> None:
        try:
            self._encoder.close()
        except Exception as error:
            _log.warning("closing %s: %s", self._device, error)
