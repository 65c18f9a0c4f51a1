"""A language model in this process: the Python surface."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions
from devices.kv_types import KVType
from devices.registry import open_decoder
from edge_runtime.budgets import put_aside, share_out
from edge_runtime.engine import Engine
from edge_runtime.errors import ConfigError, InvalidRequest, PromptTooLong
from edge_runtime.generation import Generation
from edge_runtime.heap import return_free_heap
from edge_runtime.measurements import WORKLOADS, Workload
from edge_runtime.memory import parse_budget, parse_bytes
from edge_runtime.package import Package, Variant, Weights
from edge_runtime.paths import home
from edge_runtime.placement import place
from edge_runtime.prefix_store import DEFAULT_SIZE, PrefixStore, fingerprint
from edge_runtime.request import Chunk, FinishReason, TokenLogprob, Usage
from edge_runtime.sampling import SamplingParams
from edge_runtime.store import Progress, Store
from edge_runtime.template import ChatTemplate
from edge_runtime.tiers.base import Messages, Text, TierRequest, TokenIds
from edge_runtime.tiers.local import LocalTier
from edge_runtime.tiers.router import Router
from edge_runtime.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    """As sampled, the token that ended it included."""
    finish_reason: FinishReason
    usage: Usage
    tier: str
    """Where it was made."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token, if asked for."""


class EdgeLLM:
    """Load a model and answer with it. A context manager; all methods may be called from any thread.

    ``ref`` is a model reference (``smollm2:135m``, ``hf:org/name``, a path, …); a model that is not on this machine
    is pulled first. ``device`` is ``auto``, ``cpu``, … or ``engine:device``. ``memory_budget`` (``"1GiB"``, or
    ``"25%"`` of the device's memory, of which a container has what it is confined to) is what the process may take at
    most; the KV cache gets what weights and engine leave. Without one a model is refused that would take more than 80 %
    of the memory that is free (:mod:`edge_runtime.budgets`). ``weights`` is ``fp32``, ``fp16``, ``int8`` or ``int4``;
    None takes what a present package has, int4 for a new one. ``threads``, ``kv_type``, ``max_sequences`` and
    ``batch_invariant``: see :class:`devices.DecoderOptions`. ``prompt_lookup``: answers that repeat what was said
    before come faster (:mod:`edge_runtime.prompt_lookup`). ``prefix_cache_bytes``: KV cache that finished requests may
    go on holding (None: what running ones do not need). ``prefix_store_bytes`` (``"1GiB"``): disk for prefixes of
    prompts that were used twice, or are long when the model is closed; 0: none are written or read
    (:mod:`edge_runtime.prefix_store`). ``workload``: what ``auto`` and ``cpu`` choose a device for, by what
    ``edge-glm bench`` measured here (:data:`edge_runtime.measurements.Workload`). ``progress`` hears of downloads and
    exports.

    **Prompts.** A list of messages goes through the model's chat template. A string is one user message of such a
    chat if the model has a chat template, else text to go on from. Token ids are taken as they are: to have an
    instruct model continue plain text, pass ``llm.tokenizer.encode(text)``.

    Raises UnknownReference, FetchError, UnsupportedModel, CorruptModel, StorageError, UnknownDevice,
    DeviceUnavailable, EngineError, BudgetError, ConfigError.
    """

    def __init__(
        self,
        ref: str,
        device: str = "auto",
        memory_budget: str | int | None = None,
        *,
        weights: Weights | None = None,
        threads: int | None = None,
        kv_type: KVType | None = None,
        max_sequences: int = DecoderOptions.max_sequences,
        batch_invariant: bool = False,
        prompt_lookup: bool = False,
        prefix_cache_bytes: int | None = None,
        prefix_store_bytes: str | int = DEFAULT_SIZE,
        workload: Workload = "one",
        progress: Progress | None = None,
    ) -> None:
        if workload not in WORKLOADS:
            raise ConfigError(f"workload is {', '.join(WORKLOADS)}, not {workload!r}")
        store = Store(home())
        budget_size = None if memory_budget is None else parse_budget(memory_budget)
        store_bytes = 0 if prefix_cache_bytes == 0 else parse_bytes(prefix_store_bytes)
        aside = partial(put_aside, weights=weights, size=budget_size, kv_type=kv_type)
        placed = place(store, ref, device, weights, progress, workload=workload, aside=aside)
        chosen, self._package, self._variant, self._reason = placed
        store.verify(self._package, self._variant)
        self._created = int(time.time())
        self.tokenizer = _tokenizer(self._package)
        template = ChatTemplate(self._package.chat_template, self._package.manifest.special_tokens)
        self._chats = template.source is not None
        kv_tokens, store_bytes = share_out(
            budget_size,
            chosen,
            self._package,
            self._variant,
            kv_type=kv_type,
            max_sequences=max_sequences,
            store_bytes=store_bytes,
        )
        options = DecoderOptions(
            max_sequences=max_sequences,
            kv_tokens=kv_tokens,
            threads=threads,
            kv_type=kv_type,
            batch_invariant=batch_invariant,
            cache_dir=store.home.compiled,
        )
        decoder = open_decoder(self._package.spec(self._variant), chosen.name, options)
        self._device = decoder.device
        return_free_heap()  # reading the tokenizer and the model left some
        try:
            prefixes = None
            if store_bytes:
                folder = store.prefixes(self._package.folder)
                identity = fingerprint(self._variant, decoder, options)
                prefixes = PrefixStore(folder, identity, store_bytes, store.home.prefixes)
            self._engine = Engine(
                decoder,
                self.tokenizer,
                prefix_cache_bytes=prefix_cache_bytes,
                prefix_store=prefixes,
                prompt_lookup=prompt_lookup,
                batch_invariant=batch_invariant,
            )
        except BaseException:
            decoder.close()
            raise
        limits = decoder.limits
        context = min(limits.max_context, limits.kv_tokens)
        self._tier = LocalTier(
            self._engine,
            self.tokenizer,
            template,
            max_prompt=min(limits.max_prompt, context),
            max_context=context,
            add_bos=self._package.manifest.add_bos,
            defaults=self._package.generation,
        )
        self._max_context = context

    # --- answers ------------------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Completion:
        """The whole answer; Ctrl-C cancels it.

        Raises InvalidRequest, TemplateError, PromptTooLong, Overloaded, EngineStopped, DeviceError.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise InvalidRequest(f"generate gives one completion, not {params.n}; use stream for several", "n")
        with closing(self._stream(prompt, params)) as chunks:
            return _joined(chunks)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> ChunkStream:
        """The answer as it is made, an iterator of chunks; closing or dropping it cancels it.

        Errors as for :meth:`generate`; those of the request raise here, at once.
        """
        return self._stream(prompt, params or SamplingParams())

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(vocab,) float32, after the last of ``ids``."""
        return self._engine.logits(ids)

    def score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(len(ids)-1,) float32: log p(ids[i+1] | ids[:i+1])."""
        return self._engine.score(ids)

    # --- what the server needs ----------------------------------------------------------------------------------------

    @property
    def model_id(self) -> str:
        return self._package.name

    @property
    def created(self) -> int:
        return self._created

    @property
    def ready(self) -> bool:
        return self._engine.alive

    @property
    def eos_ids(self) -> Sequence[int]:
        return self.tokenizer.eos_ids

    def start_chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams) -> Generation:
        return self._start(TierRequest(Messages(messages), params))

    def start_completion(self, prompt: str | Sequence[int], params: SamplingParams) -> Generation:
        return self._start(TierRequest(Text(prompt) if isinstance(prompt, str) else TokenIds(prompt), params))

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokenizer.token_bytes(token_id)

    # --- about --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """``engine:device`` as really opened."""
        return self._device

    @property
    def reason(self) -> str:
        """Why this device, in words."""
        return self._reason

    @property
    def placement(self) -> Mapping[str, str]:
        """What it runs on, and why."""
        return {"device": self.device, "variant": self._variant.name, "reason": self.reason}

    @property
    def package(self) -> Package:
        return self._package

    @property
    def variant(self) -> Variant:
        return self._variant

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._max_context

    def close(self) -> None:
        """End every request and free the model. Idempotent."""
        self._engine.close()
        return_free_heap()

    def __enter__(self) -> EdgeLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _stream(self, prompt: Prompt, params: SamplingParams) -> ChunkStream:
        return ChunkStream(self._start(TierRequest(self._kind_of(prompt), params)))

    def _start(self, request: TierRequest) -> Generation:
        tier = self._tier
        request = tier.prepare(request)
        fit = tier.fit(request)
        route = Router.choose(request.params, [(tier.name, fit)])
        if not route.order:
            param = "prompt" if fit.prompt_tokens >= min(fit.max_prompt, fit.max_context) else "max_tokens"
            raise PromptTooLong(route.reasons[tier.name], param)
        return tier.start(request)

    def _kind_of(self, prompt: Prompt) -> Messages | Text | TokenIds:
        if isinstance(prompt, str):
            return Messages([{"role": "user", "content": prompt}]) if self._chats else Text(prompt)
        items = list(prompt) if isinstance(prompt, Sequence) else np.asarray(prompt).tolist()
        if items and all(isinstance(item, Mapping) for item in items):
            return Messages([item for item in items if isinstance(item, Mapping)])
        ids = [int(item) for item in items if isinstance(item, int | np.integer) and not isinstance(item, bool)]
        if not items or len(ids) != len(items):
            raise InvalidRequest("a prompt is a text, a list of messages or a list of token ids; not empty", "prompt")
        return TokenIds(ids)


class ChunkStream:
    """Chunks of one generation; failures raise. Closing or forgetting it cancels the generation."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __iter__(self) -> ChunkStream:
        return self

    def __next__(self) -> Chunk:
        return next(self._generation).checked()

    def close(self) -> None:
        self._generation.close()


def _joined(chunks: Iterator[Chunk]) -> Completion:
    parts = list(chunks)
    last = parts[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    return Completion(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        tier=last.tier,
        logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
    )


def _tokenizer(package: Package) -> Tokenizer:
    manifest = package.manifest
    tokenizer = Tokenizer.from_folder(package.folder)
    tokenizer.eos_ids = manifest.eos_ids
    bos = manifest.special_tokens.get("bos_token")
    if bos is not None:
        tokenizer.bos_id = tokenizer.token_to_id(bos)
    return tokenizer
