"""What cannot be measured is refused before anything is opened, with value and limit."""

from __future__ import annotations

from typing import Any

import pytest

from edge_runtime.bench.job import Goodput, Job, LoadJob
from edge_runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_tokens": 0}, "--prompt-tokens must be at least 1, not 0"),
        ({"new_tokens": 0}, "--new-tokens must be at least 2 .*, not 0"),
        ({"new_tokens": 1}, "time between tokens"),
        ({"concurrency": 0}, "--concurrency must be at least 1, not 0"),
        ({"repeats": -1}, "--repeats must be at least 1, not -1"),
        ({"seed": -1}, "--seed must be at least 0, not -1"),
        ({"shared_prefix": 0}, "--shared-prefix must be at least 1, not 0"),
    ],
)
def test_numbers(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Job(ref="x", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_tokens": 90, "new_tokens": 11}, "--prompt-tokens 90 and --new-tokens 11 make 101 .* has 100"),
        ({"prompt_tokens": 30, "new_tokens": 21, "concurrency": 4}, "4 streams of 51 tokens .* 204 .* has 200"),
        ({"prompt_tokens": 1, "new_tokens": 2, "shared_prefix": 68}, "--shared-prefix 68 and the 32 .* 100 tokens"),
    ],
)
def test_room(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Job(ref="x", **fields).check_room(context=100, kv_tokens=200)


def test_what_just_fits() -> None:
    Job(ref="x", prompt_tokens=90, new_tokens=10, shared_prefix=67).check_room(context=100, kv_tokens=200)
    Job(ref="x", prompt_tokens=30, new_tokens=20, concurrency=4).check_room(context=100, kv_tokens=200)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_tokens": 0}, "--prompt-tokens must be at least 1, not 0"),
        ({"new_tokens": 1}, "--new-tokens must be at least 2"),
        ({"concurrency": 0}, "--concurrency must be at least 1, not 0"),
        ({"requests": 0}, "--requests must be at least 1, not 0"),
        ({"requests": 2, "concurrency": 3}, "--requests must be at least 3 .*concurrency.*, not 2"),
        ({"rate": 0.0}, "--rate must be .* above 0, not 0"),
        ({"rate": float("nan")}, "--rate must be .*, not nan"),
        ({"rate": 1.0, "concurrency": 2}, "leave --concurrency out"),
    ],
)
def test_load(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoadJob(url="http://x", **fields)


def test_requests_by_default() -> None:
    assert LoadJob(url="http://x").total == 20
    assert LoadJob(url="http://x", concurrency=8).total == 40
    assert LoadJob(url="http://x", concurrency=8, requests=9).total == 9


@pytest.mark.parametrize("words", [["ttft"], ["ttft:"], ["ttft:fast"], ["e2e:5"], ["ttft:0"], ["tpot:1", "tpot:2"]])
def test_goodput_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"--goodput takes .*, not '{words[-1]}'"):
        Goodput.parse(words)


def test_goodput() -> None:
    both = Goodput.parse(["ttft:500", "tpot:50"])
    assert both.holds(500, 50)
    assert not both.holds(501, 50)
    assert not both.holds(500, 51)
    assert both.holds(500, None)
    assert Goodput.parse(["tpot:50"]).holds(10_000, 50)
    assert not Goodput.parse(["ttft:5"]).holds(6, 1)
