"""Requests that want JSON: held to it here, asked for elsewhere, and judged by whether it is whole."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.deferred.answers import pack, unpack
from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.prompts import Messages, TierRequest
from tests.tiers.house import GREEDY, LOCAL, cloud, house, task
from tests.tiers.test_holding_back import NOWHERE, calibrated
from tests.tiers.upstream import DONE, Connection, answers, delta, stream, upstream

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "kind": {"enum": ["pump", "valve"]}},
    "required": ["on", "kind"],
    "additionalProperties": False,
}
FORM = Grammar.json_schema(SCHEMA, "state", "what it does", strict=True)
WISH = replace(GREEDY, max_tokens=150, grammar=FORM)


def test_a_local_answer_has_it(tmp_path: Path) -> None:
    with house(tmp_path, calibrated(tmp_path, during=0.9) + LOCAL + cloud(NOWHERE) + task()) as here:
        answer = here.ask(params=WISH)
        assert answer.tiers == ["local"]
        assert set(json.loads(answer.text)) == {"on", "kind"}


def test_a_remote_tier_is_asked_for_it_as_openai_has_it(tmp_path: Path) -> None:
    with (
        upstream(answers('{"on": true}')) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        here.ask(params=WISH)
        here.ask(params=replace(WISH, grammar=Grammar.json_object()))
    schema, anything = (asked.body["response_format"] for asked in server.asked)
    assert schema == {
        "type": "json_schema",
        "json_schema": {"name": "state", "schema": SCHEMA, "description": "what it does", "strict": True},
    }
    assert anything == {"type": "json_object"}


def test_one_that_is_cut_off_is_made_elsewhere(tmp_path: Path) -> None:
    policy = calibrated(tmp_path, during=0.9) + LOCAL
    with (
        upstream(answers('{"on": true, "kind": "pump"}')) as server,
        house(tmp_path, policy + cloud(server.url) + task(hold={"tokens": 16, "ms": 20000})) as here,
    ):
        answer = here.ask(params=replace(WISH, max_tokens=8))
        assert answer.tiers == ["cloud"]
        assert "its JSON is broken" in answer.route.reasons["local"]


def test_a_schema_that_no_model_here_can_be_held_to_goes_elsewhere(tmp_path: Path) -> None:
    odd = replace(WISH, grammar=Grammar.json_schema({"not": {"type": "string"}}))
    with (
        upstream(answers("3")) as server,
        house(tmp_path, LOCAL + cloud(server.url) + task()) as here,
    ):
        answer = here.ask(params=odd)
        assert answer.tiers == ["cloud"]
        assert "Unimplemented keys" in answer.route.reasons["local"]
    with (
        house(tmp_path, LOCAL + task(privacy="local-only")) as here,
        pytest.raises(InvalidRequest, match="Unimplemented keys"),
    ):
        here.ask(params=odd)


@pytest.mark.parametrize("grammar", [Grammar.regex("yes|no"), Grammar.lark('start: "yes" | "no"')])
def test_what_openai_s_api_cannot_say_stays_here(grammar: Grammar, tmp_path: Path) -> None:
    with house(tmp_path, cloud(NOWHERE) + LOCAL + task(prefer="remote")) as here:
        answer = here.ask(params=replace(GREEDY, grammar=grammar))
        assert answer.text in ("yes", "no")
        assert "cannot be held to a grammar" in answer.route.reasons["cloud"]


@pytest.mark.parametrize(
    ("begun", "goes_on"), [('{"on": true, "ki', True), ('{"on": true, "x', False)], ids=["fitting", "of another form"]
)
def test_a_local_model_goes_on_only_in_the_form(begun: str, goes_on: bool, tmp_path: Path) -> None:
    def breaks_off(client: Connection) -> None:
        client.send(stream(delta(begun)))
        client.reset()

    policy = LOCAL + task(prefer="remote", broken_stream="continue")
    with upstream(breaks_off) as server, house(tmp_path, cloud(server.url) + policy) as here:
        with here.start(params=WISH) as generation:
            chunks = list(generation)
        text = "".join(chunk.text for chunk in chunks)
        assert text.startswith(begun)
        if goes_on:
            assert json.loads(text)["on"] is True
            assert [chunk.tier for chunk in chunks][-1] == "local"
        else:
            assert text == begun
            assert chunks[-1].error is not None


def test_deferred_it_keeps_its_form(tmp_path: Path) -> None:
    asked = TierRequest(Messages([{"role": "user", "content": "x"}]), WISH)
    assert unpack(pack(asked)) == asked


def test_many_look_ups_are_under_way_at_once(tmp_path: Path) -> None:
    """A serving engine batches what it has at once; nothing here makes one wait for another."""
    count = 12
    together = threading.Barrier(count)

    def reply(client: Connection) -> None:
        together.wait(20)  # breaks, and fails the test, if they come one after the other
        client.send(stream(delta('{"on": false, "kind": "pump"}'), delta(finish="stop"), DONE))

    policy = LOCAL + task(prefer="remote", latency={"total": 20000.0})
    with upstream(reply) as server, house(tmp_path, cloud(server.url) + policy) as here:
        started = [here.start(params=WISH) for _ in range(count)]
        texts = ["".join(chunk.checked().text for chunk in generation) for generation in started]
        assert texts == ['{"on": false, "kind": "pump"}'] * count
