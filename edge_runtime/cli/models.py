"""``edge-glm pull``, ``export``, ``list``, ``show`` and ``rm``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec

from devices.base import Engine
from edge_runtime.cli.licence import licence_of
from edge_runtime.cli.progress import Bars
from edge_runtime.cli.recipes import compression_lines, parse_prune
from edge_runtime.columns import columns
from edge_runtime.errors import ConfigError
from edge_runtime.evaluation.pruning_report import report
from edge_runtime.exporting import export_package
from edge_runtime.memory import format_bytes
from edge_runtime.package import Package, storage_errors
from edge_runtime.paths import home
from edge_runtime.placement import Wish, place
from edge_runtime.recipe import Prune, Recipe
from edge_runtime.settings import load_settings
from edge_runtime.store import Store, StoredModel
from edge_runtime.terminal import harmless

_ENGINES: dict[str, tuple[Engine, ...]] = {
    "onnx": ("onnxruntime",),
    "onnx-coreml": ("onnxruntime-coreml",),
    "onnx-cuda": ("onnxruntime-cuda",),
    "onnx-edge": ("onnxruntime-edge",),
    "openvino": ("openvino",),
    "openvino-npu": ("openvino-npu",),
    "all": ("openvino", "onnxruntime", "onnxruntime-edge"),
}


def pull(arguments: argparse.Namespace) -> int:
    settings = load_settings({"device": arguments.device, "weights": arguments.weights})
    store = Store(home())
    with Bars() as bars:
        if arguments.engine is None:
            package = place(store, Wish(arguments.ref, settings.device, settings.format), bars, best=True).package
        else:
            for engine in _ENGINES[arguments.engine]:
                package, _ = store.ensure(arguments.ref, engine, settings.format, bars)
    print(harmless(f"{package.name}: {_variants(package)} in {package.folder}"))
    print(f"licence: {licence_of(package)}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    settings = load_settings({"weights": arguments.weights})
    engines = list(_ENGINES[arguments.engine])
    prune, vocabulary = (None, None) if arguments.prune is None else parse_prune(arguments.prune)
    recipe = _recipe(arguments, prune)
    calibration = None if arguments.calibrate is None else Path(arguments.calibrate)
    with Bars() as bars:
        package = export_package(
            arguments.source,
            Path(arguments.output),
            engines,
            settings.format,
            bars,
            recipe=recipe,
            calibration=calibration,
            vocabulary=vocabulary,
        )
    print(harmless(f"{package.name}: {_variants(package)} in {package.folder}"))
    print(f"licence: {licence_of(package)}")
    if recipe is not None:
        for lines in dict.fromkeys(tuple(compression_lines(each)) for each in package.manifest.variants):
            print("\n".join(lines))
    return 0


def _recipe(arguments: argparse.Namespace, prune: Prune | None) -> Recipe | None:
    """None: none was asked for. ConfigError."""
    names = ("method", "group", "symmetric", "embedding_bits", "bits", "activation_bits")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if prune is not None:
        given["prune"] = prune
    if not given and arguments.calibrate is None:
        return None
    recipe = Recipe(**given)
    if arguments.calibrate is not None and not recipe.calibrated:
        raise ConfigError(
            "--calibrate is for a recipe that learns from a text: add --method gptq or awq, --bits, or --prune with "
            "more than vocab="
        )
    return recipe


def list_models(arguments: argparse.Namespace) -> int:
    models = Store(home()).list()
    if arguments.json:
        print(json.dumps([_row(model) for model in models], indent=2))
        return 0
    rows = [
        [model.name, "-", f"cannot be opened: {model.problem}"]
        if model.package is None
        else [model.name, format_bytes(model.package.bytes), _variants(model.package)]
        for model in models
    ]
    if rows:
        print(columns(rows, "l"))
    return 0


def show(arguments: argparse.Namespace) -> int:
    store = Store(home())
    package = store.find(arguments.ref)
    if arguments.verify:
        package.verify()  # without the stamp: everything is hashed again
    if arguments.html is not None:
        _write_report(package, Path(arguments.html))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(package.manifest)).decode())
    else:
        _print_package(package)
        if arguments.verify:
            print("verified      every file has its recorded SHA-256")
    return 0


def _write_report(package: Package, file: Path) -> None:
    variant = next((each for each in package.manifest.variants if each.compression and each.compression.pruned), None)
    if variant is None:
        raise ConfigError(f"{package.name} was not pruned: there is nothing for --html to show")
    with storage_errors(f"cannot write {file}"):
        file.write_text(report(package.name, variant), encoding="utf-8")


def remove(arguments: argparse.Namespace) -> int:
    folder = Store(home()).remove(arguments.ref)
    print(f"removed {folder}")
    return 0


def _print_package(package: Package) -> None:
    manifest = package.manifest
    arch = manifest.architecture
    provenance = manifest.provenance
    rows = {
        "name": manifest.name,
        "folder": str(package.folder),
        "source": str(provenance.get("source", "unknown")),
        "licence": licence_of(package),
        "family": f"{arch.family}, {arch.parameters / 1e6:.0f}M parameters, {arch.num_layers} layers",
        "context": f"{arch.max_context} tokens, vocabulary of {arch.vocab_size}",
        "chat": "yes" if package.chat_template is not None else "no chat template",
        "made by": manifest.created_by,
    }
    for key, value in rows.items():
        print(f"{key:12}  {harmless(value)}")
    for variant in manifest.variants:
        said = f"{variant.name}: {variant.engine}, {variant.weights}, {format_bytes(variant.bytes)}"
        print(f"{'variant':12}  {harmless(said)}")
        for line in compression_lines(variant):
            print(line)


def _variants(package: Package) -> str:
    return ", ".join(variant.name for variant in package.manifest.variants)


def _row(model: StoredModel) -> dict[str, object]:
    if model.package is None:
        return {"name": model.name, "folder": str(model.folder), "problem": model.problem}
    return {
        "name": model.name,
        "folder": str(model.folder),
        "bytes": model.package.bytes,
        "variants": [variant.name for variant in model.package.manifest.variants],
        "source": model.package.manifest.provenance.get("source"),
    }
