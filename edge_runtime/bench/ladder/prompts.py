"""What is asked on every rung: questions with a long beginning that several share, as a chat about a document has."""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.bench.ladder.job import Climb
from edge_runtime.errors import ConfigError
from edge_runtime.evaluation.texts import calibration_text, evaluation_texts
from edge_runtime.tokenizer import Tokenizer

Rounds = list[list[list[int]]]
"""Token ids of each prompt of each round."""


def prompts(tokenizer: Tokenizer, climb: Climb) -> Rounds:
    """Of all rounds, the one to warm up first: pieces of real text, since a draft is as good as the text is ordinary.

    ConfigError if the texts that come along are too short for that.
    """
    text = "\n\n".join([*evaluation_texts().values(), calibration_text()])
    ids = tokenizer.encode(text)
    rounds, each = climb.repeats + 1, climb.shared_tokens + climb.requests * climb.own_tokens
    if rounds * each > len(ids):
        raise ConfigError(
            f"{rounds} rounds of {each} tokens are more than the {len(ids)} of the texts that come along: lower "
            "--prompt-tokens or --repeats"
        )
    return [_round(ids[start : start + each], climb) for start in range(0, rounds * each, each)]


def _round(ids: Sequence[int], climb: Climb) -> list[list[int]]:
    shared, own = list(ids[: climb.shared_tokens]), climb.own_tokens
    return [shared + list(ids[start : start + own]) for start in range(climb.shared_tokens, len(ids), own)]
