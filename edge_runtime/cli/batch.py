"""``edge-glm batch``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import ExitStack
from pathlib import Path

from edge_runtime.batch.files import Answers, check_requests
from edge_runtime.cli.opening import open_served
from edge_runtime.cli.progress import Bar
from edge_runtime.errors import ConfigError
from edge_runtime.settings import load_settings

AT_ONCE = 16
"""As many sequences as an engine has by default."""
_NAMES = (
    *("device", "fallback", "weights", "memory_budget", "threads", "kv_type", "prefix_store", "tuning", "max_prompt"),
    *("batch_invariant", "prompt_lookup", "draft", "draft_device", "workload", "step_timeout"),
)


def batch(arguments: argparse.Namespace) -> int:
    """1 if a request failed; what failed is in its line."""
    settings = load_settings({name: getattr(arguments, name) for name in _NAMES})
    requests, target = Path(arguments.requests), Path(arguments.answers)
    if requests.resolve() == target.resolve():
        raise ConfigError("answers go into a file of their own")
    total, models = check_requests(requests)
    answers = Answers(target, requests)
    if answers.done == total:
        print(f"{target}: all {total} are answered already", file=sys.stderr)
        return 0
    refs = models if arguments.model is None else [arguments.model]
    with ExitStack() as stack:
        stack.callback(answers.close)
        texts, embedders = open_served(refs, settings, stack)
        by_ref = {ref: model.model_id for ref, model in texts.items()}
        by_ref |= {ref: model.model_id for ref, model in embedders.items()}
        names = {model: by_ref[arguments.model or model] for model in models}
        from edge_runtime.batch.run import answer_batch
        from edge_runtime.server.app import create_app

        app = create_app(list(texts.values()), embedders=list(embedders.values()))
        bar = stack.enter_context(Bar(unit=" requests"))

        def tell(done: int) -> None:
            bar("answering", done, total)

        tell(answers.done)
        failed = asyncio.run(answer_batch(app, requests, answers, names, AT_ONCE, tell))
    told = f"{target}: {total} answers" + (f", {failed} of them failed" if failed else "")
    print(told, file=sys.stderr)
    return int(bool(failed))
