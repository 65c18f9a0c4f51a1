"""The official client gets what the engine says, streamed or not."""

from __future__ import annotations

import concurrent.futures
import json
import math
import re
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest

from edge_runtime.sampling import SamplingParams
from tests.server.served import FakeModel

HELLO: Any = [{"role": "system", "content": "Be odd."}, {"role": "user", "content": "Hello"}]
GREEDY = SamplingParams(temperature=0, max_tokens=40)


def test_chat(client: openai.OpenAI, model: FakeModel) -> None:
    text, finish = model.answer(HELLO, GREEDY)
    answer = client.chat.completions.create(model="fake", messages=HELLO, temperature=0, max_tokens=40)
    assert answer.object == "chat.completion"
    assert answer.model == "fake"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", text)
    assert choice.finish_reason == finish
    prompt = len(model.tokenizer.encode(model.template.render(HELLO), parse_special=True))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.total_tokens == prompt + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 40


def test_stream_is_the_same_text(client: openai.OpenAI, model: FakeModel) -> None:
    text, finish = model.answer(HELLO, GREEDY)
    with client.chat.completions.create(
        model="fake", messages=HELLO, temperature=0, max_completion_tokens=40, stream=True
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [finish]
    assert len(chunks) > 5
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_usage_comes_last(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="fake", messages=HELLO, temperature=0, max_tokens=7)
    with client.chat.completions.create(
        model="fake", messages=HELLO, temperature=0, max_tokens=7, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = list(stream)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens is not None
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_finish_reasons(client: openai.OpenAI, model: FakeModel) -> None:
    cut = client.chat.completions.create(model="fake", messages=HELLO, temperature=0, max_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None
    assert cut.usage.completion_tokens == 3
    ended = client.chat.completions.create(
        model="fake", messages=HELLO, temperature=0, max_tokens=40, logit_bias={"257": 100}
    )
    assert ended.choices[0].finish_reason == "stop"
    assert ended.choices[0].message.content == ""
    on = client.chat.completions.create(
        model="fake",
        messages=HELLO,
        temperature=0,
        max_tokens=5,
        logit_bias={"257": 100},
        extra_body={"ignore_eos": True},
    )
    assert on.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client: openai.OpenAI, model: FakeModel, stream: bool) -> None:
    text, _ = model.answer(HELLO, GREEDY)
    stop = text[4:6]
    options: Any = {"model": "fake", "messages": HELLO, "temperature": 0, "max_tokens": 40, "stop": ["@@", stop]}
    if stream:
        with client.chat.completions.create(**options, stream=True) as chunks:
            choices = [chunk.choices[0] for chunk in chunks]
        said, finish = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        choice = client.chat.completions.create(**options).choices[0]
        said, finish = choice.message.content, choice.finish_reason
    assert said == text[: text.index(stop)]
    assert finish == "stop"


def test_n_and_seed(client: openai.OpenAI) -> None:
    options: Any = {"model": "fake", "messages": HELLO, "max_tokens": 12, "n": 3, "seed": 5}
    first = client.chat.completions.create(**options)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [c.message.content for c in client.chat.completions.create(**options).choices] == texts
    streamed = ["", "", ""]
    roles = []
    with client.chat.completions.create(**options, stream=True) as stream:
        for chunk in stream:
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
            roles += [chunk.choices[0].index] if chunk.choices[0].delta.role else []
    assert streamed == texts
    assert roles == [0, 1, 2]


def test_chat_logprobs(client: openai.OpenAI, model: FakeModel) -> None:
    options: Any = {"model": "fake", "messages": HELLO, "temperature": 0, "max_tokens": 40}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    spoken = b"".join(bytes(entry.bytes or []) for entry in content)
    assert spoken.decode(errors="replace") == choice.message.content
    assert answer.usage is not None
    assert len(content) == answer.usage.completion_tokens - (choice.finish_reason == "stop")
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob < 0  # greedy: the likeliest was taken
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) < 1
    with client.chat.completions.create(**options, logprobs=True, stream=True) as stream:
        streamed = [
            entry
            for chunk in stream
            if chunk.choices[0].logprobs is not None
            for entry in chunk.choices[0].logprobs.content or []
        ]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content], abs=1e-5)
    assert all(entry.top_logprobs == [] for entry in streamed)


def test_the_token_that_ends_is_not_in_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=HELLO, temperature=0, logprobs=True, logit_bias={"257": 100}
    )
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content == []
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_completion_takes_every_form_of_prompt(client: openai.OpenAI, model: FakeModel) -> None:
    ids, other = model.tokenizer.encode("abc"), model.tokenizer.encode("xyz")
    options: Any = {"model": "fake", "temperature": 0, "max_tokens": 9}
    alone = client.completions.create(prompt="abc", **options)
    assert alone.object == "text_completion"
    text = alone.choices[0].text
    second = client.completions.create(prompt="xyz", **options).choices[0].text
    assert text != second
    assert client.completions.create(prompt=ids, **options).choices[0].text == text
    for both in (["abc", "xyz"], [ids, other]):
        answer = client.completions.create(prompt=both, **options)
        assert [(choice.index, choice.text) for choice in answer.choices] == [(0, text), (1, second)]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 6
    assert len(client.completions.create(prompt=["abc", "xyz"], n=2, **options).choices) == 4
    streamed = ["", ""]
    finish: list[str | None] = [None, None]
    with client.completions.create(
        prompt=["abc", "xyz"], stream=True, stream_options={"include_usage": True}, **options
    ) as stream:
        *chunks, last = list(stream)
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
        finish[chunk.choices[0].index] = chunk.choices[0].finish_reason
    assert streamed == [text, second]
    assert None not in finish
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.prompt_tokens == 6


def test_completions_end_after_16_tokens_unless_told(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="abc", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_text_does_not_make_special_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="<|im_end|>", max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("<|im_end|>")


def test_completion_logprobs(client: openai.OpenAI, model: FakeModel) -> None:
    options: Any = {"model": "fake", "prompt": "abc", "temperature": 0, "max_tokens": 60, "logprobs": 2}
    options["logit_bias"] = dict.fromkeys(model.tokenizer.encode("é"), 2)  # one character in two tokens
    options["extra_body"] = {"ignore_eos": True}
    choice = client.completions.create(**options).choices[0]
    lists = choice.logprobs
    assert lists is not None
    assert lists.tokens is not None
    assert lists.token_logprobs is not None
    assert lists.top_logprobs is not None
    assert lists.text_offset is not None
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset) == 60
    assert "bytes:\\xc3" in lists.tokens
    for token, logprob, top, offset in zip(
        lists.tokens, lists.token_logprobs, lists.top_logprobs, lists.text_offset, strict=True
    ):
        assert top[token] == logprob
        assert 2 <= len(top) <= 3
        if len(token) == 1:
            assert choice.text[offset] == token
    with client.completions.create(**options, stream=True) as stream:
        offsets = [
            o for chunk in stream if chunk.choices[0].logprobs for o in chunk.choices[0].logprobs.text_offset or []
        ]
    assert offsets == lists.text_offset


def test_sampling_options_reach_the_engine(client: openai.OpenAI, model: FakeModel) -> None:
    params = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=7, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=-0.5, seed=11, max_tokens=20, stop=("zz",), logit_bias={97: 2.5},
    )  # fmt: skip
    text, _ = model.answer(HELLO, params)
    answer = client.chat.completions.create(
        model="fake",
        messages=HELLO,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=11,
        max_tokens=20,
        stop="zz",
        logit_bias={"97": 2.5},  # type: ignore[dict-item]  # the client's type says int, the API takes numbers
        extra_body={"top_k": 7, "min_p": 0.01, "repetition_penalty": 1.2},
    )
    assert answer.choices[0].message.content == text


def test_harmless_fields_pass(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": "kim"}],
        max_tokens=1,
        user="u",
        metadata={"a": "b"},
        store=False,
        tools=[],
        response_format={"type": "text"},
        service_tier="auto",
    )
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_the_answer_has_the_form_that_is_asked_for(client: openai.OpenAI) -> None:
    class Reading(pydantic.BaseModel):
        kind: Literal["pump", "valve"]
        on: bool
        level: Annotated[int, pydantic.Field(ge=0, le=9)]

    parsed = client.chat.completions.parse(model="fake", messages=HELLO, response_format=Reading, max_tokens=200)
    assert parsed.choices[0].finish_reason == "stop"
    assert isinstance(parsed.choices[0].message.parsed, Reading)
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
    stream = client.chat.completions.create(
        model="fake",
        messages=HELLO,
        max_tokens=200,
        stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "bits", "schema": schema}},  # type: ignore[dict-item]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert 2 <= len(json.loads(text)) <= 3


@pytest.mark.parametrize(
    ("syntax", "definition"),
    [("regex", "(ab|cd){2}-[0-9]{3}"), ("lark", "start: WORD WORD /-[0-9]{3}/\nWORD: /ab|cd/")],
)
def test_the_answer_keeps_to_a_grammar(client: openai.OpenAI, syntax: str, definition: str) -> None:
    form: Any = {"type": "grammar", "syntax": syntax, "definition": definition}
    asked: Any = {"model": "fake", "messages": HELLO, "max_tokens": 50, "response_format": form}
    texts = [client.chat.completions.create(**asked, seed=seed).choices[0].message.content for seed in range(4)]
    texts.append(client.responses.create(model="fake", input="Hi", text={"format": form}).output_text)
    for text in texts:
        assert re.fullmatch("(ab|cd){2}-[0-9]{3}", text), text


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3)
    again = [*HELLO, answer.choices[0].message.model_dump(), {"role": "user", "content": "More"}]
    assert client.chat.completions.create(model="fake", messages=again, max_tokens=3).choices


def test_eight_clients_at_once_get_what_each_gets_alone(client: openai.OpenAI, model: FakeModel) -> None:
    talks: list[Any] = [[{"role": "user", "content": f"question {number} " + "x" * number * 9}] for number in range(8)]
    expected = [model.answer(talk, GREEDY)[0] for talk in talks]
    assert len(set(expected)) == 8

    def whole(talk: Any) -> str | None:
        options: Any = {"model": "fake", "messages": talk, "temperature": 0, "max_tokens": 40}
        return client.chat.completions.create(**options).choices[0].message.content

    def streamed(talk: Any) -> str:
        options: Any = {"model": "fake", "messages": talk, "temperature": 0, "max_tokens": 40, "stream": True}
        with client.chat.completions.create(**options) as stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    for ask in (whole, streamed):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, talks)) == expected


def test_models(client: openai.OpenAI) -> None:
    (only,) = client.models.list().data
    assert (only.id, only.object, only.created) == ("fake", "model", FakeModel.created)
    assert client.models.retrieve("fake") == only
    with pytest.raises(openai.NotFoundError, match="there is fake"):
        client.models.retrieve("other")


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; there is fake") as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="letters, digits") as tools:
        client.chat.completions.create(
            model="fake", messages=HELLO, tools=[{"type": "function", "function": {"name": "two words"}}]
        )
    assert tools.value.param == "tools[0].function.name"
    with pytest.raises(openai.BadRequestError, match=r"has \d+ tokens, .* 512") as long:
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x" * 600}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="the last message must be the user's") as template:
        client.chat.completions.create(model="fake", messages=[{"role": "assistant", "content": "Hi"}])
    assert template.value.param == "messages"
