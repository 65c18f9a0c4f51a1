"""An answer has the form that was asked for, whatever the model would say, and no other tokens are ruled out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.constraints import Grammars
from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.sampling import SamplingParams, make_sampler
from edge_runtime.tokenizer import Tokenizer
from tests.runtime.test_tokenizer import byte_level, sentence_piece
from tests.server.served import FakeModel, byte_tokenizer

FORMS: dict[str, Tokenizer] = {
    "byte level": Tokenizer(byte_level().to_str(), eos_ids=[262]),
    "sentence piece": Tokenizer(sentence_piece().to_str(), eos_ids=[2]),
}
GRAMMARS = {name: Grammars(tokenizer) for name, tokenizer in FORMS.items()}
MESSAGES = [{"role": "user", "content": "What is it?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=40)
TREE = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["pump", "valve", 'né"e\n']},
        "on": {"type": "boolean"},
        "level": {"type": "integer", "minimum": -3, "maximum": 40},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2},
    },
    "required": ["kind", "on"],
    "additionalProperties": False,
    "$defs": {"part": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-c]{1,3}$"}]}},
}


@pytest.fixture(scope="module")
def model() -> Iterator[FakeModel]:
    model = FakeModel()
    yield model
    model.engine.close()


def drawn(grammar: Grammar, form: str, params: SamplingParams, seed: int, limit: int = 2000) -> str | None:
    """What a model says that has no idea of anything. None: it did not come to an end."""
    tokenizer, random = FORMS[form], np.random.default_rng(seed)
    size = tokenizer.vocab_size + 3  # models have more logits than there are tokens
    sampler = make_sampler(params, size, 0, GRAMMARS[form].constraint(grammar))
    tokens = [5, 6, 7]
    while len(tokens) < limit:
        logits = random.standard_normal(size, np.float32)
        before = logits.copy()
        token = sampler(logits, tokens, 3).token_id
        np.testing.assert_array_equal(logits, before)
        if token in tokenizer.eos_ids:
            return b"".join(map(tokenizer.token_bytes, tokens[3:])).decode()
        tokens.append(token)
    return None


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Those whose answers cannot go on for ever."""
    small = st.integers(-20, 20)
    leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)}, small, small),
        st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 5)),
        st.builds(lambda values: {"enum": values}, st.lists(st.text(max_size=5), min_size=1, max_size=3, unique=True)),
    )

    def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        names = st.dictionaries(st.text(min_size=1, max_size=4), inner, min_size=1, max_size=3)
        objects = names.flatmap(
            lambda known: st.builds(
                lambda needed: {
                    "type": "object",
                    "properties": known,
                    "required": needed,
                    "additionalProperties": False,
                },
                st.lists(st.sampled_from(sorted(known)), unique=True),
            )
        )
        arrays = st.builds(
            lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, small.map(abs)
        )
        either = st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))
        return st.one_of(objects, arrays, either)

    return st.recursive(leaves, nested, max_leaves=6)


@settings(max_examples=60)
@given(schemas(), st.sampled_from(sorted(FORMS)), st.integers(0, 2**32 - 1))
def test_whatever_the_model_says_fits_the_schema(schema: dict[str, Any], form: str, seed: int) -> None:
    text = drawn(
        Grammar.json_schema(schema), form, SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0), seed, 4000
    )
    assert text is not None
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=2, top_k=0, top_p=1, min_p=0),
        SamplingParams(temperature=2, top_k=300, top_p=1, min_p=0),
        SamplingParams(temperature=2, top_k=0, top_p=0.9, min_p=0),
        SamplingParams(temperature=2, top_k=0, top_p=1, min_p=0.05),
        SamplingParams(temperature=1, repetition_penalty=1.3, logit_bias={3: 100.0}, presence_penalty=2),
    ],
    ids=["greedy", "uncut", "top-k", "top-p", "min-p", "penalties and bias"],
)
def test_whatever_the_sampler(form: str, params: SamplingParams) -> None:
    for seed in range(20):
        text = drawn(Grammar.json_schema(TREE), form, replace(params, seed=seed), seed)
        assert text is not None
        jsonschema.validate(json.loads(text), TREE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("words", [["yes", "no"], ["he", "hell", "hello!"], ["a b", "a  b", " a"], ["né", "n\n"]])
def test_what_may_follow_is_neither_more_nor_less(form: str, words: list[str]) -> None:
    """Against the plain way: try every token. Of those that spell the same (``▁`` and ``<0x20>``) one is enough."""
    tokenizer = FORMS[form]
    grammar = Grammar.regex("|".join(map(re.escape, words)))
    wanted, size = [word.encode() for word in words], tokenizer.vocab_size
    spoken = [b"" if t in tokenizer.special_ids else tokenizer.token_bytes(t) for t in range(size)]
    for word in words:
        ids = tokenizer.encode(word)
        constraint = GRAMMARS[form].constraint(grammar)
        for length in range(len(ids) + 1):
            said = b"".join(spoken[token] for token in ids[:length])
            fitting = {t for t, more in enumerate(spoken) if more and any(w.startswith(said + more) for w in wanted)}
            expected = fitting | (set(tokenizer.eos_ids) if said in wanted else set())
            left = constraint.only(np.zeros(size, np.float32), ids[:length], 0)
            allowed = set(np.isfinite(left).nonzero()[0].tolist())
            assert allowed <= expected
            assert {spoken[token] for token in allowed} == {spoken[token] for token in expected}


def test_any_json_object() -> None:
    for seed in range(40):
        text = drawn(Grammar.json_object(), "byte level", SamplingParams(temperature=1), seed, 300)
        assert text is None or isinstance(json.loads(text), dict)
    ended = [drawn(Grammar.json_object(), "byte level", SamplingParams(temperature=1), seed, 300) for seed in range(40)]
    assert any(ended)


def test_lark() -> None:
    grammar = Grammar.lark('start: "<" WORD ">" start?\nWORD: /[a-c]{1,3}/')
    for seed in range(20):
        text = drawn(grammar, "sentence piece", SamplingParams(temperature=1), seed)
        assert text is not None
        assert re.fullmatch(r"(<[a-c]{1,3}>)+", text)


def test_log_probabilities_are_the_model_s_own() -> None:
    logits = np.zeros(FORMS["byte level"].vocab_size, np.float32)
    constraint = GRAMMARS["byte level"].constraint(Grammar.regex("x"))
    sampled = make_sampler(SamplingParams(temperature=0, logprobs=2), len(logits), 0, constraint)(logits, [1], 1)
    assert sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(-np.log(len(logits)))
    assert len(sampled.logprob.top) == 2


# --- through the engine -----------------------------------------------------------------------------------------------


def test_every_completion_is_held_to_it(model: FakeModel) -> None:
    params = SamplingParams(n=3, seed=3, temperature=1, max_tokens=400, grammar=Grammar.json_schema(TREE))
    texts = {0: "", 1: "", 2: ""}
    with model.start_chat(MESSAGES, params) as generation:
        for chunk in generation:
            texts[chunk.index] += chunk.checked().text
            assert chunk.finish_reason in (None, "stop")
    for text in texts.values():
        jsonschema.validate(json.loads(text), TREE)
    assert len(set(texts.values())) > 1


def test_it_ends_where_the_form_does(model: FakeModel) -> None:
    params = replace(GREEDY, grammar=Grammar.regex("(yes|no)!"), ignore_eos=True)
    text, reason = model.answer(MESSAGES, params)
    assert text in ("yes!", "no!")
    assert reason == "stop"


def test_it_may_be_cut_off(model: FakeModel) -> None:
    params = replace(GREEDY, grammar=Grammar.regex("[ab]{30}"), max_tokens=7)
    text, reason = model.answer(MESSAGES, params)
    assert re.fullmatch("[ab]{7}", text)
    assert reason == "length"


def test_drafts_change_nothing() -> None:
    grammar = Grammar.regex("(abcabcabc[d-f]){6}")
    answers = []
    for drafting in (False, True):
        model = FakeModel(prompt_lookup=drafting)
        try:
            answers.append(model.answer(MESSAGES, replace(GREEDY, grammar=grammar, max_tokens=60)))
            assert (model.engine.stats.accepted_tokens > 0) == drafting
        finally:
            model.engine.close()
    assert answers[0] == answers[1]


def test_it_may_have_begun(model: FakeModel) -> None:
    grammar = replace(Grammar.regex("one (two|three)"), begun="one t")
    assert model.answer(MESSAGES, replace(GREEDY, grammar=grammar))[0] in ("wo", "hree")
    with pytest.raises(InvalidRequest, match="begun in another form"):
        model.answer(MESSAGES, replace(GREEDY, grammar=replace(grammar, begun="four")))


def test_one_that_grows_too_complex_fails_alone(model: FakeModel) -> None:
    grammar = Grammar.lark('start: "ab" ' + "(x|y)? " * 3000 + '\nx: "c"\ny: "d"')
    with (
        model.start_chat(MESSAGES, replace(GREEDY, grammar=grammar)) as failing,
        model.start_chat(MESSAGES, GREEDY) as other,
    ):
        with pytest.raises(InvalidRequest, match="held to this grammar"):
            [chunk.checked() for chunk in failing]
        assert "".join(chunk.checked().text for chunk in other) == model.answer(MESSAGES, GREEDY)[0]


# --- refused ----------------------------------------------------------------------------------------------------------

DEEP: dict[str, Any] = {"type": "object"}
for _ in range(300):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grammar.json_schema({"type": "strin"}),
        lambda: Grammar.json_schema({"not": {"type": "string"}}),
        lambda: Grammar.json_schema({"$ref": "#/nowhere"}),
        lambda: Grammar.json_schema({"type": "string", "format": "weird"}),
        lambda: Grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 1}),
        lambda: Grammar.json_schema({"enum": []}),
        lambda: Grammar.json_schema(DEEP),
        lambda: Grammar.json_schema({"type": "string", "pattern": "("}),
        lambda: Grammar.json_schema({"x": object()}),
        lambda: Grammar.json_schema("x"),  # type: ignore[arg-type]
        lambda: Grammar.regex("("),
        lambda: Grammar.regex("(?=x)y"),
        lambda: Grammar.regex("x" * 300_000),
        lambda: Grammar.lark("start: nothing"),
        lambda: Grammar.lark(""),
    ],
)
def test_what_cannot_be_held_to_is_refused(make: Callable[[], Grammar], model: FakeModel) -> None:
    with pytest.raises(InvalidRequest) as error:
        model.answer(MESSAGES, replace(GREEDY, grammar=make()))
    assert error.value.param == "response_format"
    assert len(str(error.value)) < 500


def test_params_take_no_other_grammar() -> None:
    with pytest.raises(InvalidRequest, match="grammar must be a Grammar"):
        SamplingParams(grammar="json")  # type: ignore[arg-type]


def test_without_a_tokenizer_that_can(model: FakeModel) -> None:
    odd = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(InvalidRequest, match="with this model's tokenizer"):
        Grammars(Tokenizer(odd.to_str(), eos_ids=[1])).constraint(Grammar.json_object())
    endless = byte_tokenizer()
    endless.eos_ids = ()
    with pytest.raises(InvalidRequest, match="no token that ends a text"):
        Grammars(endless).constraint(Grammar.json_object())
    without = FakeModel(grammars=None)
    try:
        with pytest.raises(InvalidRequest, match="cannot be held to a grammar"):
            without.answer(MESSAGES, replace(GREEDY, grammar=Grammar.json_object()))
    finally:
        without.engine.close()
