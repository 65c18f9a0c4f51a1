"""What leaving tokens of a prompt out costs: ``python -m tests.bench.prompt_pruning REF``.

The tokens of a context that the model itself foresaw best are left out (self-information: Li et al., Selective Context,
arXiv 2310.06201), or every n-th, whatever it is. What follows the context is then predicted by what is left of it, and
held against the predictions after all of it.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from edge_runtime.evaluation.metrics import Tally, log_softmax
from edge_runtime.evaluation.subject import Subject
from edge_runtime.evaluation.texts import evaluation_texts
from edge_runtime.paths import home
from edge_runtime.placement import Wish, place
from edge_runtime.store import Store

CONTEXT, AFTER = 448, 64
"""Tokens."""
LEFT_OUT = (0.1, 0.25, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ref")
    parser.add_argument("--device", default="edge:cpu")
    parser.add_argument("--weights")
    arguments = parser.parse_args()
    store = Store(home())
    wish = Wish(arguments.ref, arguments.device, arguments.weights)
    tallies = {(how, share): Tally() for how in ("foreseen", "evenly") for share in LEFT_OUT}
    with Subject(store, place(store, wish)) as model:
        for text in evaluation_texts().values():
            ids = np.array(model.tokenizer.encode(text), np.int64)
            for start in range(0, len(ids) - CONTEXT - AFTER, CONTEXT + AFTER):
                part = ids[start : start + CONTEXT + AFTER]
                whole = _logits(model, part)
                surprise = -log_softmax(whole[: CONTEXT - 1])[np.arange(CONTEXT - 1), part[1:CONTEXT]]
                for (how, share), tally in tallies.items():
                    kept = _kept(how, share, surprise)
                    rows = _logits(model, np.concatenate([part[:CONTEXT][kept], part[CONTEXT:]]))
                    tally.add(rows[-AFTER:-1], part[-AFTER + 1 :], whole[-AFTER:-1])
    for (how, share), tally in tallies.items():
        figures = tally.figures()
        print(
            f"{share:.0%} left out, {how}: top-1 {figures.top1:.1%}, KL {figures.kl:.4f}, perplexity "
            f"{figures.reference_perplexity:.2f} → {figures.perplexity:.2f}"
        )


def _kept(how: str, share: float, surprise: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Of the context's tokens. The first, which nothing foresees, stays."""
    count = round(share * CONTEXT)
    kept = np.ones(CONTEXT, bool)
    places = np.argsort(surprise)[:count] if how == "foreseen" else np.linspace(0, CONTEXT - 2, count).round()
    kept[1 + places.astype(int)] = False
    return kept


def _logits(model: Subject, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.concatenate([rows.copy() for rows in model.logits(ids, model.chunk)])


if __name__ == "__main__":
    main()
