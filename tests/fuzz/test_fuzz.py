"""A small share of the malformed inputs: the full run is ``python -m tests.fuzz``."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import CorruptModel
from edge_runtime.server import context, protocol
from tests.fuzz.__main__ import shares
from tests.fuzz.campaign import run, smaller
from tests.fuzz.mutation import as_json, damage, disturb, unquoted, vary
from tests.fuzz.surface import Case, Surface, judged
from tests.fuzz.surfaces import SURFACES
from tests.fuzz.surfaces.gguf import put_together, take_apart
from tests.fuzz.surfaces.requests import KEYS, Requests, request
from tests.fuzz.toml import as_toml
from tests.fuzz.watched import Watched
from tests.server.served import CHAT

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are the system's")
SHARE = {"requests": 100, "manifest": 80, "foreign": 50, "upstream": 100, "safetensors": 100, "gguf": 100}
"""Inputs of the slow ones; the others get 200."""


@linux
@pytest.mark.parametrize("name", SURFACES)
def test_nothing_fails(name: str, tmp_path: Path) -> None:
    result = run(SURFACES[name], SHARE.get(name, 200), seed=1, keep=tmp_path)
    assert [finding.detail for finding in result.findings.values()] == []
    assert result.inputs == result.accepted + result.refused == SHARE.get(name, 200)
    assert result.refused > result.inputs / 10, "the inputs are hardly malformed"
    least = result.inputs / 5 if name in ("policy", "template", "tokenizer") else 1
    assert result.accepted >= least, "hardly anything gets past what reads it"


# --- what finds must find ---------------------------------------------------------------------------------------------


class Faulty(Surface):
    """Does what its input says."""

    name = "faulty"
    weight = 0

    def prepare(self) -> list[Case]:
        return [Case("x", b"fine")]

    def make(self, rng: random.Random) -> Case:
        return Case("x", rng.choice((b"fine", b"refuse", b"some text that raises an error")))

    def run(self, case: Case) -> None:
        if b"refuse" in case.data:
            raise CorruptModel("it is refused")
        if b"empty" in case.data:
            raise CorruptModel("")
        if b"raise" in case.data:
            raise KeyError("x")
        if b"panic" in case.data:
            raise SystemExit(3)
        if b"die" in case.data:
            os.abort()
        if b"grow" in case.data:
            self.held = bytearray(b"x") * (300 * 2**20)
        while b"hang" in case.data:
            time.perf_counter()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with Watched(Faulty, tmp_path_factory.mktemp("faulty"), 0) as watched:
        yield watched


@linux
def test_every_kind_of_failure_is_found(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.watched.CPU_SECONDS", 0.5)
    texts = (b"fine", b"die", b"refuse", b"raise", b"panic", b"empty", b"hang", b"grow", b"fine")
    verdicts = [watched.run([Case("x", text)])[0] for text in texts]
    kinds = [verdict.kind for verdict in verdicts]
    assert kinds == ["accepted", "failed", "refused", *["failed"] * 5, "accepted"]
    said = " ".join(verdict.detail for verdict in verdicts)
    for words in ("ended with -6", "KeyError", "SystemExit", "an empty message", "no end after", "memory grew"):
        assert words in said
    assert watched.growth > 256 * 2**20


@linux
def test_the_one_to_blame_is_found_among_many(watched: Watched) -> None:
    kinds = [verdict.kind for verdict in watched.run([Case("x", text) for text in (b"fine", b"die", b"refuse")])]
    assert kinds == ["accepted", "failed", "refused"]


@linux
def test_a_failing_input_is_made_small_and_kept(watched: Watched, tmp_path: Path) -> None:
    case = Case("x", b"some text that raises an error")
    (verdict,) = watched.run([case])
    assert smaller(case, verdict, watched).data == b"raise"
    result = run(Faulty, 30, seed=0, keep=tmp_path / "kept")
    (finding,) = result.findings.values()
    assert finding.file.read_bytes() == b"raise"
    assert result.accepted + result.refused + finding.times == result.inputs == 30
    assert result.failures == finding.times > 1


class Sulking(Faulty):
    """Refuses all after the first malformed input."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        self._hurt = False

    def make(self, rng: random.Random) -> Case:
        return Case("x", b"refuse")

    def run(self, case: Case) -> None:
        self._hurt |= b"refuse" in case.data
        super().run(Case("x", b"refuse") if self._hurt else case)


@linux
def test_a_surface_that_takes_nothing_any_more_is_found(tmp_path: Path) -> None:
    result = run(Sulking, 5, seed=0, keep=tmp_path)
    (finding,) = result.findings.values()
    assert finding.detail == "a valid input at the end is refused: it is refused"
    assert finding.file.read_bytes() == b"fine"
    assert (result.refused, result.failures) == (5, 1)


def test_a_server_that_answers_no_more_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((protocol, "HEAD_SECONDS"), (context, "BODY_SECONDS")):
        monkeypatch.setattr(module, name, getattr(module, name))  # which the surface sets
    surface = Requests(tmp_path, 0)
    body = json.dumps(CHAT).encode()
    cases = [Case(name, request("/v1/chat/completions", body, key=key)) for name, key in KEYS.items()]
    surface.prepare()
    surface.open()
    try:
        assert [verdict.kind for _, verdict in surface.run_all(cases)] == ["accepted", "accepted"]
        surface.models["keyed"].engine.close()
        (alone,) = surface.run_all(cases[:1])
        assert alone[1].detail.startswith("a good request to the keyed server afterwards is refused: HTTP 503")
        assert {verdict.kind for _, verdict in surface.run_all(cases * 2)} == {"failed"}
    finally:
        surface.close()


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SURFACES if name != "manifest"])
def test_inputs_are_the_same_for_a_seed(name: str, tmp_path: Path) -> None:
    made = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        surface = SURFACES[name](tmp_path / place, 3)
        surface.prepare()
        made.append([surface.make(random.Random(number)) for number in range(20)])
    assert made[0] == made[1]
    assert len(set(made[0])) > 10


def test_every_input_belongs_to_a_surface() -> None:
    found = shares(list(SURFACES), 100_000)
    assert sum(found.values()) == 100_000
    assert min(found.values()) > 3000
    assert shares(["gguf"], 100_000) == {"gguf": found["gguf"]}


def test_structures_are_written_as_they_are_or_raw() -> None:
    value: dict[str, Any] = {"a": [1, "x", None], "b": {"c": True}}
    rng = random.Random(0)
    assert {as_json(rng, value) for _ in range(100)} >= {b'{"a": [1, "x", null], "b": {"c": true}}'}
    assert unquoted('{"a": "\ue000[[", "b": "\\ue0001e999"}') == '{"a": [[, "b": 1e999}'
    assert as_toml(rng, {"a": [1, "x"], "b": {"c": True}}) == b'a = [1, "x"]\nb = {c = true}\n'
    assert as_toml(rng, {"a": 1, "b": {"c": True}}, tables=True) == b"a = 1\n[b]\nc = true\n"
    assert value == {"a": [1, "x", None], "b": {"c": True}}


def test_something_is_changed() -> None:
    rng = random.Random(0)
    data, value = bytes(range(200)), {"a": [1, "x", None], "b": {"c": True}}
    assert sum(damage(rng, data) != data for _ in range(100)) > 90
    assert sum(disturb(rng, value, lambda: 3) != value for _ in range(100)) > 80


def test_what_is_varied_keeps_its_types() -> None:
    rng = random.Random(0)
    value = {"type": "x", "way": "up", "list": [1, 2], "inner": {"a": 1.5, "b": True}, "none": None}
    words = {"type": (), "way": ("up", "down")}
    made = [vary(rng, value, [{"inner": {"a": 7.0, "b": False}}], words) for _ in range(200)]
    for each in made:
        assert {key: type(inner) for key, inner in each.items()} == {key: type(inner) for key, inner in value.items()}
        assert [type(inner) for inner in each["inner"].values()] == [float, bool]
        assert each["type"] == "x"
        assert {type(item) for item in each["list"]} <= {int}
    assert {each["way"] for each in made} == {"up", "down"}
    assert {"a": 7.0, "b": False} in [each["inner"] for each in made]
    assert sum(each != value for each in made) > 100


def test_a_gguf_file_taken_apart_and_put_together_is_the_same(tmp_path: Path) -> None:
    surface = SURFACES["gguf"](tmp_path, 0)
    for case in surface.prepare():
        assert put_together(take_apart(case.data)) == case.data


def test_refusals_and_failures_are_told_apart(tmp_path: Path) -> None:
    faulty = Faulty(tmp_path, 0)
    kinds = [judged(faulty, Case("x", data)).kind for data in (b"fine", b"refuse", b"raise", b"empty")]
    assert kinds == ["accepted", "refused", "failed", "failed"]
