"""Each surface: how its inputs are made, and what takes them."""

from __future__ import annotations

from tests.fuzz.surface import Surface
from tests.fuzz.surfaces.foreign import ForeignFolders
from tests.fuzz.surfaces.generation import GenerationDefaults
from tests.fuzz.surfaces.gguf import GgufFiles
from tests.fuzz.surfaces.ledger import Ledgers
from tests.fuzz.surfaces.manifest import Manifests
from tests.fuzz.surfaces.policy import Policies
from tests.fuzz.surfaces.queue import Queues
from tests.fuzz.surfaces.requests import Requests
from tests.fuzz.surfaces.safetensors import SafetensorsFolders
from tests.fuzz.surfaces.settings import SettingsFiles
from tests.fuzz.surfaces.template import Templates
from tests.fuzz.surfaces.tokenizer import Tokenizers
from tests.fuzz.surfaces.upstream import Upstreams
from tests.fuzz.surfaces.wheel import Wheels

SURFACES: dict[str, type[Surface]] = {
    surface.name: surface
    for surface in (
        Requests,
        Upstreams,
        GgufFiles,
        SafetensorsFolders,
        Wheels,
        Manifests,
        ForeignFolders,
        Policies,
        SettingsFiles,
        Tokenizers,
        Templates,
        GenerationDefaults,
        Queues,
        Ledgers,
    )
}
