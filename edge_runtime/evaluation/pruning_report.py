"""What was pruned, by which ranking, and what it cost, as an HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from edge_runtime.bench import plots
from edge_runtime.bench.page import card, page, tile
from edge_runtime.package import Variant
from edge_runtime.recipe import Compression, Pruned, Ranking


def report(name: str, variant: Variant) -> str:
    """``variant`` was pruned."""
    made = variant.compression
    assert made is not None
    assert made.pruned is not None
    title = f"{name}, pruned"
    body = [f"<h1>{escape(title)}</h1>", f'<div class="tiles">{"".join(_tiles(made, made.pruned))}</div>']
    if made.pruned.ranking is not None:
        body += [
            f'<div class="plots">{"".join(_maps(made.pruned.ranking))}</div>',
            card("What is left", _layers(made.pruned, made.pruned.ranking), "wide"),
        ]
    return page(title, "".join(body))


def _tiles(made: Compression, pruned: Pruned) -> Iterator[str]:
    for words, quality in (("before repair", pruned.before_repair), ("repaired", pruned.quality)):
        if quality:
            yield tile(f"Top-1, {words}", f"{quality['top1']:.1%}")
            yield tile(f"KL divergence, {words}", f"{quality['kl']:.3f}", "nats")
    if made.quality:
        yield tile("Top-1, rounded", f"{made.quality['top1']:.1%}")
        yield tile("KL divergence, rounded", f"{made.quality['kl']:.3f}", "nats")
    yield tile("A weight has", f"{made.bits:.2f}", "bits")
    if pruned.vocabulary is not None:
        yield tile("Vocabulary", f"{pruned.vocabulary:,}", "tokens")


def _maps(ranking: Ranking) -> Iterator[str]:
    lost = "How far the output moves without it alone: mean KL divergence, nats a token."
    layers = [[value] for value in ranking.layer_loss]
    yield _map("KV groups, each with its query heads", ranking.group_loss, lost, "nats")
    yield _map("Neurons: without ¼, ½ and ¾ of a layer's", ranking.neuron_loss, lost, "nats")
    yield _map("Whole layers", layers, lost, "nats")
    change = [[value] for value in ranking.layer_change]
    yield _map("How much a layer changes the stream", change, "1 − cosine of the stream before and after it.", "")
    squares = "Mean square of what a query head adds to the stream"
    yield _map("Energy of heads", ranking.head_energy, f"{squares}.", "")
    yield _map("Fluctuation of heads", ranking.head_fluctuation, f"{squares}, around its mean.", "")


def _map(name: str, rows: tuple[tuple[float, ...], ...] | list[list[float]], words: str, unit: str) -> str:
    return card(name, f"{plots.heat_map(rows, unit, name)}<p>{escape(words)}</p>")


def _layers(pruned: Pruned, ranking: Ranking) -> str:
    kept = iter(zip(pruned.kv_heads, pruned.neurons, strict=True))
    rows = []
    for layer, groups in enumerate(ranking.group_loss):
        if layer in pruned.layers:
            left = '<td class="number">cut</td><td></td>'
        else:
            heads, neurons = next(kept)
            left = f'<td class="number">{heads} of {len(groups)}</td><td class="number">{neurons:,}</td>'
        rows.append(f"<tr><th>{layer}</th>{left}</tr>")
    head = '<tr><th>layer</th><th class="number">KV groups</th><th class="number">neurons</th></tr>'
    return f"<table>{head}{''.join(rows)}</table>"


__all__ = ["report"]
