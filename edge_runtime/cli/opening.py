"""Opening the models that a command serves, of either kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from devices.encoder import DEVICES
from devices.host import host_memory
from devices.registry import choose_device
from edge_runtime.cli.licence import told_if_pulled
from edge_runtime.cli.progress import Bars
from edge_runtime.cli.run import open_model
from edge_runtime.embedder import EdgeEmbedder
from edge_runtime.errors import BudgetError, ConfigError, ModelNotFound, UnsupportedModel
from edge_runtime.llm import EdgeLLM
from edge_runtime.memory import parse_budget
from edge_runtime.model_facts import facts_of
from edge_runtime.paths import home
from edge_runtime.placement import Wish, place
from edge_runtime.settings import Settings
from edge_runtime.store import Store

if TYPE_CHECKING:
    from edge_runtime.server.served import ServedEmbedder, ServedModel
    from edge_runtime.server.shelf import Offer


def open_served(
    refs: Sequence[str], settings: Settings, stack: ExitStack
) -> tuple[dict[str, EdgeLLM], dict[str, EdgeEmbedder]]:
    """Models that make text and encoders, by their references; ``stack`` closes them. Encoders come first, which take
    what they take; models that make text share what a budget leaves, in equal parts."""
    encoders = [ref for ref in refs if _is_encoder(ref, settings)]
    embedders = {ref: stack.enter_context(_open_encoder(ref, settings)) for ref in encoders}
    texts = [ref for ref in refs if ref not in encoders]
    if len(texts) > 1 and settings.policy is not None:
        raise ConfigError("a policy is for one model that makes text; its tiers are the others")
    models: dict[str, EdgeLLM] = {}
    for index, ref in enumerate(texts):
        own = settings
        if len(texts) > 1 and settings.memory_budget is not None:
            own = msgspec.structs.replace(settings, memory_budget=_part(settings.memory_budget, len(texts) - index))
        models[ref] = stack.enter_context(open_model(ref, own, "many"))
    return models, embedders


def _part(budget: str, sharing: int) -> str:
    """Up to where the process may grow with the next of so many models."""
    import psutil

    total = parse_budget(budget).within(lambda: host_memory().total)
    used = int(psutil.Process().memory_info().rss)
    return str(used + max(total - used, 0) // sharing)


def _is_encoder(ref: str, settings: Settings) -> bool:
    """Fetches what is not on this machine."""
    store = Store(home())
    package = store.present(ref)
    if package is None:
        try:
            store.outline(ref, "int4")
        except UnsupportedModel:
            return True  # or nothing that is known, which opening it says
        except ModelNotFound:
            with told_if_pulled(ref), Bars() as bars:
                package = place(store, Wish(ref, settings.device, settings.format), bars).package
        else:
            return False
    return package.manifest.encoder is not None


def _open_encoder(ref: str, settings: Settings, name: str | None = None) -> EdgeEmbedder:
    device = settings.device if settings.device in DEVICES else "auto"
    weights = settings.format if settings.format in ("fp32", "fp16") else None
    with Bars() as bars:
        return EdgeEmbedder(
            ref,
            device,
            settings.memory_budget,
            weights=weights,
            threads=settings.threads,
            step_timeout=settings.step_timeout,
            progress=bars,
            name=name,
        )


def offers(
    settings: Settings, opened: Collection[EdgeLLM | EdgeEmbedder]
) -> tuple[dict[str, Offer[ServedModel]], dict[str, Offer[ServedEmbedder]]]:
    """All models of this machine but those ``opened``, to be opened on demand; one that calls itself as another does,
    by its folder's name.

    Of a budget each gets half of what is left, so that a second one has room too; where there is none, one goes that
    nobody uses."""
    from edge_runtime.server.shelf import Offer

    folders, names = {each.package.folder.resolve() for each in opened}, {each.model_id for each in opened}
    texts: dict[str, Offer[ServedModel]] = {}
    encoders: dict[str, Offer[ServedEmbedder]] = {}
    for stored in Store(home()).list():
        package = stored.package
        if package is None or package.folder.resolve() in folders:
            continue
        name = stored.folder.name if stored.name in names else stored.name
        facts = facts_of(package, package.manifest.variants[0])
        created, ref = int(package.folder.stat().st_mtime), str(package.folder)
        if package.manifest.encoder is not None:
            encoders[name] = Offer(partial(_open_encoder, ref, settings, name), facts, created)
        else:
            texts[name] = Offer(partial(_open_text, ref, settings, name), facts, created)
    return texts, encoders


def offers_elsewhere(models: Mapping[str, EdgeLLM], settings: Settings) -> dict[str, Offer[ServedModel]]:
    """``models``, by their references, on the other devices that were named; as :func:`offers`. ConfigError,
    UnknownDevice, DeviceUnavailable."""
    from edge_runtime.server.shelf import Offer

    if settings.other_devices and settings.policy is not None:
        raise ConfigError("a policy is for one model on one device: leave --also-on out")
    found: dict[str, Offer[ServedModel]] = {}
    for device in settings.other_devices:
        choose_device(device)  # now, rather than when somebody asks
        own = msgspec.structs.replace(settings, device=device)
        for ref, model in models.items():
            name = f"{model.model_id}@{device}"
            found[name] = Offer(partial(_open_text, ref, own, name), model.facts, model.created)
    return found


def _open_text(ref: str, settings: Settings, name: str) -> EdgeLLM:
    if settings.memory_budget is None:
        return open_model(ref, settings, "many", name)
    try:
        half = msgspec.structs.replace(settings, memory_budget=_part(settings.memory_budget, 2))
        return open_model(ref, half, "many", name)
    except BudgetError:
        return open_model(ref, settings, "many", name)
