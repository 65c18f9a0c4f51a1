"""A served model without weights: the real engine, tokenizer and chat template over the fake decoder."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import httpx
import tokenizers
from starlette.applications import Starlette
from tokenizers import decoders, models, pre_tokenizers

from devices.base import Step
from edge_runtime.condition import Condition
from edge_runtime.constraints import Grammars
from edge_runtime.engine import Engine, Generation
from edge_runtime.engine_stats import EngineStats
from edge_runtime.model_facts import ModelFacts
from edge_runtime.prompts import NOTHING, About, Messages, Text, TierRequest, TokenIds
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.run import listen, make_server, url_of
from edge_runtime.server.served import Tiers
from edge_runtime.template import ChatTemplate
from edge_runtime.tiers.local import LocalTier
from edge_runtime.tokenizer import Tokenizer
from tests.fake_decoder import FakeDecoder

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ raise_exception('the last message must be the user\\'s') }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPEECH = "abcdefghijklmnopqrstuvwxyz ,.é"
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
TEXT: dict[str, Any] = {"model": "fake", "prompt": "Hi", "max_tokens": 3}
"""Small requests to :class:`FakeModel`."""


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, then ``<|im_start|>`` (256) and ``<|im_end|>`` (257), which ends a completion."""
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(models.BPE(alphabet, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(inner.to_str(), eos_ids=[257])


def schema_format(schema: dict[str, Any], name: str = "answer") -> dict[str, Any]:
    """As ``response_format``."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


class FakeModel:
    """Speaks in the letters of SPEECH, each answer a function of its prompt."""

    created = 1_700_000_000
    placement = MappingProxyType({"device": "fake:cpu", "variant": "fake-fp32", "reason": "there is no other"})

    def __init__(
        self,
        model_id: str = "fake",
        before_forward: Callable[[Sequence[Step]], None] = lambda batch: None,
        max_context: int = 512,
        **engine_options: Any,
    ) -> None:
        self.model_id = model_id
        self.tokenizer = byte_tokenizer()
        self.template = ChatTemplate(TEMPLATE)
        self.eos_ids = self.tokenizer.eos_ids
        self.decoder = FakeDecoder(
            vocab_size=258, max_context=max_context, max_sequences=16, kv_tokens=8192, before_forward=before_forward
        )
        silent = [t for t in range(258) if t not in {*self.tokenizer.encode(SPEECH), *self.eos_ids}]
        self.decoder.table[:, silent] -= 100
        options = {"grammars": Grammars(self.tokenizer), **engine_options}
        self.engine = Engine(self.decoder, self.tokenizer, vocab_size=258, **options)
        self.tier = LocalTier(
            self.engine, self.tokenizer, self.template, max_prompt=max_context, max_context=max_context
        )

    @property
    def ready(self) -> bool:
        return self.engine.alive

    @property
    def condition(self) -> Condition:
        return Condition(self.engine.failure)

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats

    @property
    def kv_tokens(self) -> int:
        return self.engine.limits.kv_tokens

    @property
    def tiers(self) -> Tiers | None:
        return None

    def start_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, about: About = NOTHING
    ) -> Generation:
        return self.tier.start(TierRequest(Messages(messages), params, about))

    def start_completion(
        self, prompt: str | Sequence[int], params: SamplingParams, about: About = NOTHING
    ) -> Generation:
        asked = Text(prompt) if isinstance(prompt, str) else TokenIds(prompt)
        return self.tier.start(TierRequest(asked, params, about))

    @property
    def facts(self) -> ModelFacts:
        return ModelFacts(
            "llama", 135_000_000, "int4", 98_000_000, self.max_context, "0" * 64, "apache-2.0", self.template.source
        )

    @property
    def max_context(self) -> int:
        return self.decoder.limits.max_context

    def tokenize(self, prompt: Messages | Text, add_bos: bool = True) -> list[int]:
        return self.tier.encode(TierRequest(prompt, SamplingParams()))

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokenizer.token_bytes(token_id)

    def close(self) -> None:
        self.engine.close()

    def answer(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams) -> tuple[str, str | None]:
        """Text and finish reason, straight from the engine: what the server must say too."""
        with self.start_chat(messages, params) as generation:
            chunks = [chunk.checked() for chunk in generation]
        return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason


@contextmanager
def running(app: Starlette, *, allow_open: bool = False) -> Iterator[str]:
    """``app`` on a real socket; gives its URL."""
    listener: socket.socket = listen(app, "127.0.0.1", 0, allow_open=allow_open)
    server = make_server(app, "warning")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The OpenAI error body, checked for its form."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert error["message"]
    assert "Traceback" not in error["message"]
    return error
