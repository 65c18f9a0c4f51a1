"""Chat templates: the right text for the families we run, from messages of the right form."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from edge_runtime.errors import InvalidRequest, TemplateError
from edge_runtime.template import ChatTemplate

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello "},
    {"role": "user", "content": "Why?"},
]

# name → (source, special tokens, text for TALK), as Transformers renders it. The sources are in the form the
# families' own templates have.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TALK = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n Hello <|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
)
QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not
        (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if message.thought is string %}
            {%- set thought = message.thought %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
FAMILIES: dict[str, tuple[str, dict[str, str], str]] = {
    "smollm2": (SMOLLM2, {"bos_token": "<|im_start|>"}, CHATML_TALK),
    "qwen2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        {},
        CHATML_TALK,
    ),
    "qwen3": (QWEN3, {}, CHATML_TALK),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
        " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        {"bos_token": "<|begin_of_text|>"},
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Hello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "glm-edge": (
        "{% for item in messages %}{% if item['role'] == 'system' %}<|system|>\n{{ item['content'] }}"
        "{% elif item['role'] == 'user' %}<|user|>\n{{ item['content'] }}{% elif item['role'] == 'assistant' %}"
        "<|assistant|>\n{{ item['content'] }}{% endif %}{% endfor %}<|assistant|>",
        {},
        "<|system|>\nBe brief.<|user|>\nHi<|assistant|>\n Hello <|user|>\nWhy?<|assistant|>",
    ),
    "glm-4": (
        "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\n# Tools"
        "{% for tool in item['tools'] %}\n\n{{ tool['function'] | tojson(indent=4) }}{% endfor %}{% endif %}"
        "{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        {},
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\n Hello <|user|>\nWhy?<|assistant|>",
    ),
    "phi-3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
        "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        {"eos_token": "<|endoftext|>"},
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n Hello <|end|>\n<|user|>\nWhy?<|end|>\n"
        "<|assistant|>\n",
    ),
    "gemma-3": (
        GEMMA3,
        {"bos_token": "<bos>"},
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
        "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
        "{%- if loop.first and system_message is defined %}"
        "{{- ' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}{%- else %}"
        "{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}{%- elif message['role'] == 'assistant' %}"
        "{{- ' ' + message['content'] + eos_token}}{%- else %}"
        "{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}",
        {"bos_token": "<s>", "eos_token": "</s>"},
        "<s> [INST] Be brief.\n\nHi [/INST]  Hello </s> [INST] Why? [/INST]",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    source, tokens, expected = FAMILIES[family]
    assert ChatTemplate(source, tokens).render(TALK) == expected


def test_default_system_prompt_and_no_generation_prompt() -> None:
    text = ChatTemplate(SMOLLM2).render([{"role": "user", "content": "Hi"}], add_generation_prompt=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
    )


def test_extra_names_reach_the_template() -> None:
    template = ChatTemplate(QWEN3)
    asked = [{"role": "user", "content": "Hi"}]
    assert template.render(asked, enable_thinking=False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    with_tools = template.render(asked, tools=[{"name": "<f>", "n": [1, 2.5, None, True]}])
    assert '\n{"name": "<f>", "n": [1, 2.5, null, true]}<|im_end|>' in with_tools  # no HTML escapes


def test_thinking_is_cut_out_of_earlier_answers() -> None:
    talk = [TALK[1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}, TALK[3]]
    assert "<|im_start|>assistant\nHello<|im_end|>" in ChatTemplate(QWEN3).render(talk)


def test_refusal_by_the_template_is_told() -> None:
    with pytest.raises(TemplateError, match="System role not supported") as caught:
        ChatTemplate(GEMMA, {"bos_token": "<bos>"}).render(TALK)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}\nend", "user\nend"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "02"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hi!"),
        ("{{ {'b': '<é>', 'a': [1]}|tojson }}{{ {'a': 1}|tojson(indent=2) }}", '{"b": "<é>", "a": [1]}{\n  "a": 1\n}'),
        ("{% macro f(x) %}[{{ x }}{{ caller() if caller else '' }}]{% endmacro %}{{ f(1) }}"
         "{% call f(2) %}c{% endcall %}", "[1][2c]"),
        ("{% for k in [1, [2, [3]]] recursive %}{% if k is iterable %}({{ loop(k) }}){% else %}{{ k }}{% endif %}"
         "{% endfor %}", "1(2(3))"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join(',') }}", "Hi"),
        ("{% if messages|selectattr('role', 'equalto', 'x') %}a generator is true{% endif %}", "a generator is true"),
        ("{{ '%s-%03d' % ('a', 7) }}{{ '{:>4}|{0}'.format(1) if false else '{:>4}'.format('b') }}", "a-007   b"),
        ("{{ 'a' ~ 1 ~ none }}{{ 'ab' * 2 }}{{ [1] + [2] }}{{ 7 // 2 }}{{ 2 ** 10 }}", "a1Noneabab[1, 2]31024"),
        ("{% set x %}b{{ 1 }}{% endset %}{{ x|upper }}{% filter upper %}c{% endfilter %}", "B1C"),
        ("{{ missing }}{{ missing is defined }}{{ messages[0].missing|default('d') }}", "Falsed"),
        ("{{ 'x, y ,z'.split(',')|map('trim')|list }}{{ 'a b'|title }}{{ 'abc'[::-1] }}", "['x', 'y', 'z']A Bcba"),
        ("{% for a, b in {'k': 1}.items() %}{{ a }}{{ b }}{{ loop.last }}{{ loop.length }}{% endfor %}", "k1True1"),
        ("{% for x in 'abcd' if x != 'b' %}{{ loop.index }}{{ x }}{% else %}none{% endfor %}", "1a2c3d"),
        ("{{ (1, 2)[1] }}{% set a, b = 3, 4 %}{{ a }}{{ b }}{{ 3 in [3] }}{{ 1 < 2 < 3 }}", "234TrueTrue"),
        ("{{ dict(a=1).a }}{{ namespace(b=2).b }}{{ strftime_now('%%') }}{{ [1, 2]|sum }}", "12%3"),
        ("{{ 'a-b'.replace('-', '+') }}{{ 'x'.join(['1', '2']) }}{{ ' s '.strip() }}{{ 'k=v'.partition('=')[2] }}",
         "a+b1x2sv"),
        ("{{ tools is none }}{{ documents is none }}{{ tools is defined }}", "TrueTrueTrue"),
    ],
)  # fmt: skip
def test_what_templates_use(source: str, expected: str) -> None:
    assert ChatTemplate(source).render([{"role": "user", "content": "Hi"}]) == expected


def test_long_conversations_are_within_bounds() -> None:
    talk = [{"role": ("user", "assistant")[i % 2], "content": f"message {i} " + "word " * 200} for i in range(400)]
    text = ChatTemplate(QWEN3).render(talk)
    assert text.count("<|im_start|>") == 401
    one = ChatTemplate(QWEN3).render([{"role": "user", "content": "x" * 4_000_000}])
    assert len(one) > 4_000_000


def test_renders_in_several_threads_at_once() -> None:
    template = ChatTemplate(SMOLLM2)
    texts: dict[int, str] = {}

    def render(number: int) -> None:
        for _ in range(50):
            texts[number] = template.render([{"role": "system", "content": str(number)}])

    threads = [threading.Thread(target=render, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {n: f"<|im_start|>system\n{n}<|im_end|>\n<|im_start|>assistant\n" for n in range(4)}


# --- messages ---------------------------------------------------------------------------------------------------------


def test_text_parts_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": parts}]) == "a\nb"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "", "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "a", "extra": object()}], "messages[0]"),
    ],
)
def test_messages_of_another_form(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(SMOLLM2).render(messages)
    assert caught.value.param == param


def test_a_model_without_a_template_refuses() -> None:
    with pytest.raises(TemplateError, match=r"no chat template.*v1/completions"):
        ChatTemplate(None).render(TALK)
