"""The process of one rung: prepares its model, or measures it, or looks how far it agrees with the first rung."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.bench.child import serve
from edge_runtime.bench.ladder.baseline import BaselineModel, Graph
from edge_runtime.bench.ladder.job import Agreement, Answered, Climb, Measured, Rung, What, baseline_of
from edge_runtime.bench.ladder.prompts import prompts
from edge_runtime.bench.machine import peak_rss_bytes
from edge_runtime.cli.progress import Bars
from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.evaluation.evaluate import evaluate
from edge_runtime.evaluation.subject import Subject
from edge_runtime.evaluation.texts import evaluation_texts
from edge_runtime.exporting import write_baseline
from edge_runtime.llm import EdgeLLM
from edge_runtime.paths import home
from edge_runtime.placement import Wish, place
from edge_runtime.sampling import SamplingParams
from edge_runtime.store import Store
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.tuning.records import Options


class Order(msgspec.Struct, frozen=True):
    """The line that the worker reads."""

    what: What
    climb: Climb
    rung: Rung
    folder: str
    """Where the plain graph is written."""
    graph: Graph | None = None
    """None while there is none."""


class Answer(msgspec.Struct, frozen=True):
    """What the worker writes; of an order to prepare, the graph of the first rung."""

    graph: Graph | None = None
    measured: Measured | None = None
    agreement: Agreement | None = None
    error: str | None = None


def obey(line: bytes) -> bytes:
    order = msgspec.json.decode(line, type=Order)
    work: dict[What, Callable[[Order], Answer]] = {"prepare": _prepare, "measure": _measure, "agree": _agree}
    try:
        answer = work[order.what](order)
    except EdgeError as error:
        answer = Answer(error=str(error))
    return msgspec.json.encode(answer)


def _prepare(order: Order) -> Answer:
    rung, climb = order.rung, order.climb
    with Bars() as bars:
        if rung.unfused:
            architecture, file = write_baseline(climb.ref, Path(order.folder), bars)
            return Answer(graph=Graph(architecture, str(file)))
        with closing(_open(climb, rung, bars)) as llm:
            needed = climb.prompt_tokens + climb.new_tokens
            if needed > llm.max_context:
                raise ConfigError(
                    f"--prompt-tokens {climb.prompt_tokens} and --new-tokens {climb.new_tokens} make {needed} tokens; "
                    f"the context of this model on {rung.device} has {llm.max_context}"
                )
            first, here = order.graph, llm.package.manifest.architecture
            if first is not None and here.vocab_size != first.architecture.vocab_size:
                raise ConfigError(
                    f"{llm.package.name} has {here.vocab_size} tokens and {climb.ref} {first.architecture.vocab_size}: "
                    "what they choose cannot be compared"
                )
    return Answer()


def _measure(order: Order) -> Answer:
    """Each request waits for the one before it."""
    climb = order.climb
    if order.rung.unfused:
        with closing(_baseline(order)) as baseline:
            return _asked(baseline.tokenizer, climb, lambda prompt: baseline.answer(np.array(prompt), climb.new_tokens))
    with closing(_open(climb, order.rung)) as llm:
        return _asked(llm.tokenizer, climb, lambda prompt: _answer(llm, prompt, climb.new_tokens))


def _asked(tokenizer: Tokenizer, climb: Climb, ask: Callable[[list[int]], Answered]) -> Answer:
    rounds = [[ask(prompt) for prompt in each] for each in prompts(tokenizer, climb)]
    return Answer(measured=Measured(rounds[1:], peak_rss_bytes()))


def _agree(order: Order) -> Answer:
    rung = order.rung
    store = Store(home())
    wish = Wish(rung.ref or order.climb.ref, rung.device, rung.weights)
    with (
        closing(_baseline(order)) as reference,
        Subject(store, place(store, wish), order.climb.threads) as model,
    ):
        figures = evaluate(model, reference, evaluation_texts()).overall
    assert figures.top1 is not None
    assert figures.kl is not None
    return Answer(agreement=Agreement(figures.top1, figures.kl))


def _open(climb: Climb, rung: Rung, progress: Bars | None = None) -> EdgeLLM:
    return EdgeLLM(
        rung.ref or climb.ref,
        rung.device,
        rung.memory_budget,
        weights=rung.weights,
        threads=climb.threads,
        draft=rung.draft,
        draft_device=rung.draft_device,
        prefix_cache_bytes=None if rung.reuse else 0,
        prefix_store_bytes=0,
        tuning=Options(prefill_chunk=climb.prompt_tokens) if rung.whole else Options(),
        progress=progress,
    )


def _baseline(order: Order) -> BaselineModel:
    package = Store(home()).present(order.climb.ref)  # of the rungs above, which were prepared
    assert package is not None
    assert order.graph is not None
    tokenizer = Tokenizer.from_folder(package.folder)
    return BaselineModel(order.graph, baseline_of(order.rung.device), tokenizer, order.climb.threads)


def _answer(llm: EdgeLLM, prompt: list[int], count: int) -> Answered:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    tokens: list[int] = []
    first = None
    started = time.perf_counter()
    with closing(llm.stream(prompt, params)) as chunks:
        for chunk in chunks:
            tokens += chunk.token_ids
            if first is None and tokens:
                first = time.perf_counter() - started
    seconds = time.perf_counter() - started
    return Answered(tokens, seconds if first is None else first, seconds)


if __name__ == "__main__":
    serve(obey)
