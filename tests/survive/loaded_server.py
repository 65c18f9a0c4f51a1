"""A server with something of everything to do, in a process of its own (``python -m tests.survive.loaded_server DIR``).

``fake`` answers slowly, ``later`` defers what it is asked, ``encoder`` takes long for each batch, and ``huge`` can be
opened, which takes a minute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from devices.base import Step
from edge_runtime.condition import Condition
from edge_runtime.embedder import Embeddings
from edge_runtime.errors import EngineStopped
from edge_runtime.heartbeat import HEARTBEAT
from edge_runtime.model_facts import ModelFacts
from edge_runtime.server import run
from edge_runtime.server.app import create_app
from edge_runtime.server.shelf import Offer, Shelf
from edge_runtime.stuck import leave
from tests.server.served import FakeModel
from tests.tiers.house import LOCAL, FakeLocal, House, TieredModel, task

GRACE_S = 1.5
STEP_S = 0.01
STEP_TIMEOUT_S = 2.0


class Encoder:
    """Embeds a text in a fifth of a second."""

    model_id, created, hidden_size, max_tokens = "encoder", 7, 4, 100
    placement: Mapping[str, str] = MappingProxyType({"device": "fake:cpu", "variant": "fp32", "reason": "it is there"})
    condition = Condition()

    def __init__(self) -> None:
        self.ready = True

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts("bert", 1, "fp32", 1, 100, "0" * 64)

    def embed(
        self,
        texts: Sequence[str] | Sequence[Sequence[int]],
        *,
        truncate: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Embeddings:
        for _ in texts:
            if not self.ready or not wanted():
                raise EngineStopped("the encoder was closed")
            time.sleep(0.2)
        return Embeddings(np.zeros((len(texts), 4), np.float32), len(texts))

    def close(self) -> None:
        self.ready = False


def slow(batch: Sequence[Step]) -> None:
    time.sleep(STEP_S)


def open_for_long() -> FakeModel:
    time.sleep(60)
    return FakeModel("huge")


def main(folder: Path) -> int:
    run.GRACE_SECONDS = GRACE_S
    HEARTBEAT.interval = 0.2
    fake = FakeModel("fake", before_forward=slow, max_context=2048, step_timeout=STEP_TIMEOUT_S)
    local = FakeLocal()
    house = House(folder, LOCAL + task(mode="deferred", privacy="local-only"), local)
    later = TieredModel(house)
    later.model_id, later.decoder, later.template = "later", local.fake.decoder, local.fake.template
    local.fake.decoder.before_forward = slow
    offers = {
        "huge": Offer(open_for_long, fake.facts, 7),
        "small": Offer(lambda: FakeModel("small"), fake.facts, 7),
    }
    shelf = Shelf([fake, later], [Encoder()], offers, keep_alive=2.0)
    app = create_app(shelf)
    run.serve(app, port=0)
    shelf.close()
    fake.close()
    house.dispatcher.close()
    local.close()
    print("closed", flush=True)
    return leave(0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
