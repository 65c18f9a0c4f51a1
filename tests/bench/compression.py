"""What recipes cost a model, in one table: bits a weight, divergence and agreement beside the source in float32.

    python -m tests.bench.compression MODEL [--recipe method=gptq,group=64,… …]

MODEL is whatever ``edge-glm export`` takes as a file or folder. Everything is computed in numpy, with activations that
are not rounded, on the texts that come along (edge_runtime/texts); the time is that of making it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import msgspec

from edge_runtime.evaluation.metrics import Tally
from edge_runtime.evaluation.texts import calibration_text, evaluation_texts
from edge_runtime.recipe import Recipe
from exporters.compression.compress import Text
from exporters.compression.shrink import Shrinking, shrink
from exporters.formats import open_checkpoint

RECIPES = (
    "group=64",
    "method=gptq,group=64",
    "method=awq,group=64",
    "method=awq+gptq,group=64",
    "method=gptq,group=128",
    "method=gptq,group=64,embedding_bits=4",
    "method=gptq,group=64,embedding_bits=4,bits=4.6",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", nargs="+", default=RECIPES)
    arguments = parser.parse_args()
    calibration = Text("calibration.txt", calibration_text())
    evaluation = [Text(name, text) for name, text in evaluation_texts().items()]
    print("| recipe | bits | perplexity | KL | top-1 | top-5 | seconds |")
    print("|---|---|---|---|---|---|---|")
    for words in arguments.recipe:
        given = dict(each.split("=") for each in words.split(","))
        recipe = msgspec.convert(given, Recipe, strict=False)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            source = open_checkpoint(arguments.model)
            _, made = shrink(source, Shrinking(recipe, calibration, evaluation, Tally), "int4", Path(folder))
            seconds = time.perf_counter() - started
        found = made.quality
        print(
            f"| {words} | {made.bits:.2f} | {found['perplexity']:.2f} ({found['reference_perplexity']:.2f}) | "
            f"{found['kl']:.4f} | {found['top1']:.2%} | {found['top5']:.2%} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
