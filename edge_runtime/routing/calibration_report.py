"""A calibration in words, and as an HTML page with the ROC curve and what quality costs."""

from __future__ import annotations

from html import escape

from edge_runtime.bench import plots
from edge_runtime.bench.page import card, page, tile
from edge_runtime.routing.calibrate import Fitted
from edge_runtime.routing.logistic import roc

_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def lines(fitted: Fitted) -> list[str]:
    """For a terminal."""
    measured = fitted.calibration.measured
    assert measured is not None
    return [
        f"{measured.tasks} requests held out; {measured.good:.1%} of the local answers are good",
        f"AUROC {measured.auroc_before:.3f} before anything runs, {measured.auroc_during:.3f} with the first words, "
        f"{measured.auroc_consistent:.3f} with the consistency checker",
        f"threshold {fitted.calibration.threshold:.3f}: {measured.remote_share:.1%} go to the remote tier, "
        f"{measured.quality:.1%} of its quality is kept",
        "ROC, bad answers kept → good answers kept: "
        + ", ".join(f"{bad:.0%} → {good:.0%}" for bad, good in _roc(fitted)),
        "remote share  quality",
        *(f"{share:12.0%}  {quality:7.1%}" for share, quality in _table(fitted)),
    ]


def report(fitted: Fitted) -> str:
    measured = fitted.calibration.measured
    assert measured is not None
    title = f"Routing, calibrated for {fitted.calibration.model}"
    tiles = [
        tile("AUROC, prompt only", f"{measured.auroc_before:.3f}"),
        tile("AUROC, first words", f"{measured.auroc_during:.3f}"),
        tile("AUROC, with forks", f"{measured.auroc_consistent:.3f}"),
        tile("Remote share", f"{measured.remote_share:.1%}"),
        tile("Quality kept", f"{measured.quality:.1%}"),
    ]
    curves = [
        (f"ROC, {kind}", "share of bad answers kept", "share of good answers kept", roc(scores, fitted.good))
        for kind, scores in fitted.scores.items()
    ]
    cost = [(point.remote_share, point.quality) for point in fitted.points]
    curves.append(("What quality costs", "share of requests to the remote tier", "share of its quality kept", cost))
    plotted = (card(name, f"{plots.line(points, across, '', name)}<p>{up}</p>") for name, across, up, points in curves)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{measured.tasks} requests held out, {measured.good:.1%} of the local answers good</p>",
        f'<div class="tiles">{"".join(tiles)}</div>',
        f'<div class="plots">{"".join(plotted)}</div>',
        card("Signals", _weights(fitted), "wide"),
    ]
    return page(title, "".join(body))


def _roc(fitted: Fitted) -> list[tuple[float, float]]:
    """The most good answers for no more than each of some shares of the bad, by the first words."""
    points = roc(fitted.scores["during"], fitted.good)
    return [(share, max(good for bad, good in points if bad <= share)) for share in (0.05, 0.1, 0.2, 0.3, 0.5)]


def _table(fitted: Fitted) -> list[tuple[float, float]]:
    """The best quality at no more than each of some shares."""
    return [
        (share, max(point.quality for point in fitted.points if point.remote_share <= share + 1e-9))
        for share in _SHARES
    ]


def _weights(fitted: Fitted) -> str:
    """What counts, and how much: weights of the standardized signals."""
    model = fitted.calibration.consistent
    ranked = sorted(zip(model.names, model.weights, strict=True), key=lambda each: -abs(each[1]))
    rows = [
        f'<tr><th>{escape(name)}</th><td class="number">{weight:+.2f}</td></tr>' for name, weight in ranked if weight
    ]
    return f"<table>{''.join(rows)}</table>"
