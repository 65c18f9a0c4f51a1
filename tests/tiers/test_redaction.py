"""What should not leave does not, and comes back in the answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.egress.detectors import detectors, find
from edge_runtime.egress.redaction import ChunkRestorer, Redaction, Restorer
from edge_runtime.grammar import Grammar
from edge_runtime.prompts import About
from edge_runtime.request import Chunk
from edge_runtime.sampling import SamplingParams
from tests.tiers.house import LOCAL, cloud, house, task
from tests.tiers.upstream import DONE, Connection, answers, delta, stream, upstream

ALL = detectors([("badge", r"B-\d{6}")], "DE")
SECRETS = {
    "EMAIL": ["anna.müller+x@mail.example.co.uk", "bob.o'neil@ex-ample.com"],
    "PHONE": ["+49 30 901820", "+1 650-253-0000", "030 901820", "0151 23456789"],
    "CARD": ["4111 1111 1111 1111", "5500005555555559", "3782-822463-10005"],
    "IBAN": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "FR1420041010050500013M02606"],
    "IP": ["192.168.1.20", "2001:db8::8a2e:370:7334", "fe80::1"],
    "PLACE": ["52.5200, 13.4050", "-33.8688 151.2093", "52°31'12\"N"],
    "KEY": [
        "sk-abcdefghijklmnopqrstuv",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "AKIAIOSFODNN7EXAMPLE",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w",
        "Bearer abcdef.ghijkl",
        "postgres://admin:hunter2@",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIBOgIBAAJBAK\n-----END RSA PRIVATE KEY-----",
        "x7Kq9ZpL2mN4vB8tR1wY5cD3",
    ],
    "BADGE": ["B-123456"],
}
EACH = [(kind, secret) for kind, secrets in SECRETS.items() for secret in secrets]


@pytest.mark.parametrize(("kind", "secret"), EACH)
def test_each_kind_is_found(kind: str, secret: str) -> None:
    text = f"Please use {secret} for it; thanks"
    spans = find(text, ALL)
    assert [(text[span.start : span.end], span.kind) for span in spans] == [(secret, kind)]


@pytest.mark.parametrize(
    "text",
    [
        "the meeting is at 12:30:45 on 2026-11-27, in room 431",
        "version 1.2.3 costs 4.50 and weighs 12.345 kg",
        "4111 1111 1111 1112 is no card, nor is 0000 0000 0000 0000",
        "DE89 3704 0044 0532 0130 02 has a wrong checksum",
        "999.999.999.999 is no address",
        "internationalization-of-everything and antidisestablishmentarianism",
        "f(x) = a::b, std::vector",
        "ask me @ noon",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert find(text, ALL) == []


def test_the_same_text_has_the_same_placeholder_wherever_it_stands() -> None:
    redaction = Redaction(ALL)
    body = redaction.apply(
        {
            "model": "a@b.example",
            "messages": [
                {"role": "user", "content": "I am anna@x.example, she is eva@x.example"},
                {"role": "assistant", "content": "Hello anna@x.example"},
                {"role": "user", "content": [{"type": "text", "text": "write to eva@x.example"}]},
            ],
            "stop": ["anna@x.example"],
            "tools": [{"type": "function", "function": {"description": "for anna@x.example", "name": "f"}}],
            "temperature": 0.5,
        }
    )
    assert body["model"] == "a@b.example"
    assert body["messages"][0]["content"] == "I am [EMAIL_1], she is [EMAIL_2]"
    assert body["messages"][1]["content"] == "Hello [EMAIL_1]"
    assert body["messages"][2]["content"][0]["text"] == "write to [EMAIL_2]"
    assert body["stop"] == ["[EMAIL_1]"]
    assert body["tools"][0]["function"]["description"] == "for [EMAIL_1]"
    assert body["temperature"] == 0.5
    assert "x.example" not in json.dumps({**body, "model": ""})


def test_a_placeholder_of_the_text_itself_is_left_alone() -> None:
    redaction = Redaction(ALL)
    body = redaction.apply({"prompt": "[EMAIL_1] is not anna@x.example"})
    assert body["prompt"] == "[EMAIL_1] is not [EMAIL_2]"
    assert Restorer(redaction.originals).add(body["prompt"]) == "[EMAIL_1] is not anna@x.example"


def test_what_overlaps_goes_as_a_whole() -> None:
    text = "https://x.example/?mail=anna@x.example&ip=10.0.0.1 and anna@192.168.1.2.example"
    redaction = Redaction(ALL)
    redacted = redaction.apply({"prompt": text})["prompt"]
    assert "anna" not in redacted
    assert "192.168" not in redacted
    assert "10.0.0.1" not in redacted


@pytest.mark.parametrize("text", ["a" * 200_000, "1 " * 50_000, "a@" * 50_000, ":" * 100_000, "+1" * 50_000])
def test_no_text_takes_forever(text: str) -> None:
    find(text, ALL)  # the suite's timeout holds it


ORIGINALS = {"[EMAIL_1]": "a@b.example", "[EMAIL_12]": "[", "[KEY_1]": 'x"[EMAIL_1]\\', "[CARD_3]": ""}
PIECES = st.lists(st.sampled_from([*ORIGINALS, "[", "[EM", "AIL_1", "]", "text ", "[EMAIL_2]", "1", "_"]), max_size=12)


def plainly(text: str) -> str:
    """The twin: the whole answer at once."""
    return re.sub("|".join(map(re.escape, ORIGINALS)), lambda match: ORIGINALS[match[0]], text)


@given(PIECES, st.data())
def test_restoring_by_pieces_is_restoring_at_once(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    restorer = Restorer(ORIGINALS)
    assert "".join(map(restorer.add, parts)) + restorer.flush() == plainly(text)


def test_text_that_is_no_beginning_of_a_placeholder_does_not_wait() -> None:
    restorer = Restorer(ORIGINALS)
    assert restorer.add("a list [1, 2") == "a list [1, 2"
    assert restorer.add("] and [E") == "] and "
    assert restorer.add("x") == "[Ex"


def test_arguments_of_tool_calls_come_back_as_json() -> None:
    restorer = ChunkRestorer({"[KEY_1]": 'a"b\n'})

    def call(arguments: str, finish: Any = None) -> Chunk:
        calls = [{"index": 0, "function": {"arguments": arguments}}]
        return Chunk(finish_reason=finish, extra={"tool_calls": calls})

    chunks = [
        *restorer.add(call('{"key": "[KE')),
        *restorer.add(call('Y_1]", "n": "[')),
        *restorer.add(call("x", "stop")),
    ]
    arguments = "".join(
        each["function"]["arguments"] for chunk in chunks for each in (chunk.extra or {}).get("tool_calls", ())
    )
    assert json.loads(arguments + '"}') == {"key": 'a"b\n', "n": "[x"}


# --- over the wire ----------------------------------------------------------------------------------------------------


def test_nothing_of_it_is_on_the_wire_and_all_of_it_in_the_answer(tmp_path: Path) -> None:
    text = " and ".join(secret for _, secret in EACH)

    def echo(client: Connection) -> None:
        said = client.asked.body["messages"][0]["content"]
        answers(*(said[place : place + 3] for place in range(0, len(said), 3)))(client)

    policy = '[privacy]\nphone_region = "DE"\npatterns = [{name = "badge", regex = "B-[0-9]{6}"}]\n'
    with (
        upstream(echo) as server,
        house(tmp_path, policy + cloud(server.url) + LOCAL + task(prefer="remote", privacy="redact")) as here,
    ):
        answer = here.ask([{"role": "user", "content": text}])
        assert answer.text == text
        wire = server.asked[0].raw.decode() + json.dumps(server.asked[0].body, ensure_ascii=False)
        for _, secret in EACH:
            assert secret not in wire


def test_an_answer_in_json_stays_json(tmp_path: Path) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----"

    def reply(client: Connection) -> None:
        placeholder = re.search(r"\[KEY_\d+\]", client.asked.body["messages"][0]["content"])
        assert placeholder
        client.send(stream(delta(f'{{"key": "{placeholder[0]}"}}'), delta(finish="stop"), DONE))

    params = SamplingParams(grammar=Grammar.json_object())
    with (
        upstream(reply) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote", privacy="redact")) as here,
    ):
        answer = here.ask([{"role": "user", "content": f"the key is {key}"}], params)
        assert json.loads(answer.text) == {"key": key}


def test_what_is_not_asked_is_not_sent(tmp_path: Path) -> None:
    about = About(headers={"x-secret": "one"}, metadata={"who": "two"}, fields={"user": "three"})
    with (
        upstream(answers("hi")) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        here.ask(about=about)
        wire = server.asked[0].raw.decode()
        assert not any(word in wire for word in ("one", "two", "three"))
