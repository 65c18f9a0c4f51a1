"""What the server needs of a model, and nothing more. :class:`edge_runtime.EdgeLLM` is one; so is a test's fake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from edge_runtime.condition import Condition
from edge_runtime.engine_stats import EngineStats
from edge_runtime.generation import Generation
from edge_runtime.model_facts import ModelFacts
from edge_runtime.prompts import NOTHING, About, Messages, Text, TierRequest
from edge_runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from edge_runtime.deferred.deferrals import Deferrals
    from edge_runtime.embedder import Embeddings


class Tiers(Protocol):
    """Of a policy, as far as the server needs them; :class:`edge_runtime.routing.dispatcher.Dispatcher`."""

    @property
    def deferrals(self) -> Deferrals:
        """Requests that are answered later."""

    def defers(self, request: TierRequest) -> bool:
        """Whether a request is to be. TemplateError, InvalidRequest."""

    def health(self) -> Mapping[str, Any]:
        """For /health."""


class Served(Protocol):
    """A loaded model of either kind. All methods may be called from any thread, several at a time."""

    @property
    def model_id(self) -> str:
        """The name that requests use as ``model``."""

    @property
    def created(self) -> int:
        """Unix time, in seconds, as /v1/models shows it."""

    @property
    def placement(self) -> Mapping[str, str]:
        """``device``, ``variant`` and ``reason``: what it runs on, and why, as /v1/models shows it."""

    @property
    def ready(self) -> bool:
        """False once the model is closed or its engine has died; /health then answers 503."""

    @property
    def condition(self) -> Condition:
        """How it is, for /health."""

    @property
    def facts(self) -> ModelFacts:
        """What it is."""

    def close(self) -> None:
        """End every request, the batch that runs excepted, and free it. Idempotent."""


class ServedEmbedder(Served, Protocol):
    """An encoder; :class:`edge_runtime.embedder.EdgeEmbedder`."""

    @property
    def hidden_size(self) -> int:
        """Numbers of an embedding."""

    @property
    def max_tokens(self) -> int:
        """Of a text."""

    def embed(
        self,
        texts: Sequence[str] | Sequence[Sequence[int]],
        *,
        truncate: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Embeddings:
        """See :meth:`edge_runtime.embedder.EdgeEmbedder.embed`."""


class ServedModel(Served, Protocol):
    """A model that makes text."""

    @property
    def stats(self) -> EngineStats:
        """What its engine does and has done."""

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that it has, over all requests."""

    @property
    def eos_ids(self) -> Sequence[int]:
        """Tokens that end a completion; logprobs leave out the one that did."""

    @property
    def tiers(self) -> Tiers | None:
        """What is made of its policy; None: there is none."""

    def start_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, about: About = NOTHING
    ) -> Generation:
        """Render the chat template with a generation prompt, tokenize and submit; returns without waiting for a token.

        A message is ``{"role": str, "content": str | list of {"type": "text", "text": str}}``, with ``name`` if given.
        Fields of ``params`` that are None get the model's generation defaults here.
        Raises TemplateError, InvalidRequest, PromptTooLong, Overloaded, EngineStopped, TierUnavailable.
        """

    def start_completion(
        self, prompt: str | Sequence[int], params: SamplingParams, about: About = NOTHING
    ) -> Generation:
        """Submit plain text (bos put before it if the model wants that) or token ids as they are. As ``start_chat``."""

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""

    def tokenize(self, prompt: Messages | Text, add_bos: bool = True) -> list[int]:
        """Token ids of a prompt, as it would be run; ``add_bos``: of text, whether bos is put before it if the model
        wants that. TemplateError, InvalidRequest."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones by their names. InvalidRequest for what is no token id."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token stands for (a part of a character for some); special tokens: their name."""
