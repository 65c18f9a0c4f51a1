"""``edge-glm eval``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec

from edge_runtime.cli.progress import Bars
from edge_runtime.columns import columns
from edge_runtime.errors import ConfigError
from edge_runtime.evaluation.evaluate import Evaluation, evaluate
from edge_runtime.evaluation.metrics import Figures
from edge_runtime.evaluation.subject import Subject
from edge_runtime.evaluation.texts import evaluation_texts, read_texts
from edge_runtime.paths import home
from edge_runtime.placement import Wish, place
from edge_runtime.settings import load_settings
from edge_runtime.store import Store


def evaluate_model(arguments: argparse.Namespace) -> int:
    if arguments.reference is None and (arguments.reference_weights or arguments.reference_device):
        raise ConfigError("--reference-weights and --reference-device say something of a --reference: name one")
    settings = load_settings({"device": arguments.device, "weights": arguments.weights})
    texts = read_texts([Path(file) for file in arguments.text]) if arguments.text else evaluation_texts()
    store = Store(home())
    with ExitStack() as stack, Bars() as bars:
        wish = Wish(arguments.ref, settings.device, settings.format)
        model = stack.enter_context(Subject(store, place(store, wish, bars)))
        reference = None
        if arguments.reference is not None:
            device = arguments.reference_device or settings.device
            wish = Wish(arguments.reference, device, arguments.reference_weights)
            reference = stack.enter_context(Subject(store, place(store, wish, bars)))
        result = evaluate(model, reference, texts, bars)
    print(msgspec.json.format(msgspec.json.encode(result)).decode() if arguments.json else table(result))
    return 0


def table(result: Evaluation) -> str:
    lines = [result.model] + ([] if result.reference is None else [f"beside {result.reference}"]) + [""]
    rows = {**result.texts, **({"overall": result.overall} if len(result.texts) > 1 else {})}
    cells = [["text", *_HEADS], *([name, *_cells(figures)] for name, figures in rows.items())]
    if result.reference is None:
        cells = [row[:3] for row in cells]
    return "\n".join([*lines, columns(cells, head=True)])


_HEADS = ("tokens", "perplexity", "reference", "KL", "KL p99", "top-1", "top-5", "greedy the same")


def _cells(figures: Figures) -> Iterator[str]:
    yield f"{figures.tokens:,}"
    yield f"{figures.perplexity:.3f}"
    if figures.kl is None:
        return
    yield f"{figures.reference_perplexity:.3f}"
    yield f"{figures.kl:.5f}"
    yield f"{figures.kl_p99:.5f}"
    yield f"{figures.top1:.2%}"
    yield f"{figures.top5:.2%}"
    parted = figures.divergence
    yield "" if parted is None else f"{parted.mean:.1f} of {parted.tokens} tokens"


__all__ = ["evaluate_model", "table"]
