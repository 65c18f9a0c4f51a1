"""A language model in this process: the Python surface."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions
from devices.kv_types import KVWish
from edge_runtime.answer import ChunkStream, Completion, joined
from edge_runtime.condition import Condition
from edge_runtime.engine_stats import EngineStats
from edge_runtime.errors import ConfigError, InvalidRequest
from edge_runtime.exporting import Progress
from edge_runtime.generation import Generation
from edge_runtime.heap import return_free_heap
from edge_runtime.loading import Loaded, Loading
from edge_runtime.measurements import WORKLOADS, Workload
from edge_runtime.memory import parse_budget, parse_bytes
from edge_runtime.memory_watch import MemoryWatch
from edge_runtime.model_facts import ModelFacts, facts_of
from edge_runtime.opening import open_model
from edge_runtime.package import Package, Variant, WeightsWish
from edge_runtime.paths import home
from edge_runtime.policy.rules import LocalTierSpec
from edge_runtime.prefix_store import DEFAULT_SIZE
from edge_runtime.prompts import NOTHING, About, Messages, Text, TierRequest, TokenIds
from edge_runtime.sampling import SamplingParams
from edge_runtime.step_watch import STEP_TIMEOUT_S
from edge_runtime.store import Store
from edge_runtime.tiers.model import LocalModel
from edge_runtime.tracing import trace as tracing
from edge_runtime.tuning.records import Options

if TYPE_CHECKING:
    from edge_runtime.deferred.deferrals import Ticket
    from edge_runtime.routing.dispatcher import Dispatcher

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


class EdgeLLM:
    """Load a model and answer with it. A context manager; all methods may be called from any thread.

    ``ref`` is a model reference (``smollm2:135m``, ``hf:org/name``, a path, …); a model that is not on this machine
    is pulled first. ``device`` is ``auto``, ``cpu``, … or ``engine:device``. Where a name stands for several devices,
    the next takes over when one does not open or fails while running; with ``fallback`` those of ``auto`` do so for
    any ``device``. Requests of which nothing was sent are answered there, the others end with the error.
    ``memory_budget`` (``"1GiB"``, or ``"25%"`` of the device's memory, of which a container has what it is confined to)
    is what the process may take at most; the KV cache gets what weights and engine leave. Without one a model is
    refused that would take more than 80 % of the memory that is free (:mod:`edge_runtime.budgets`). ``weights`` is
    ``fp32``, ``fp16``, ``int8`` or ``int4``; None takes the smallest that a present package has, int4 for a new one.
    ``auto`` takes the smallest that keeps the model's answers, and for a prompt that the KV cache beside it has no room
    for, between requests, a smaller one (:mod:`edge_runtime.variants`, :mod:`edge_runtime.switching`).
    ``threads``, ``kv_type``, ``max_sequences``, ``max_prompt`` (for NPUs) and ``batch_invariant``: see
    :class:`devices.DecoderOptions`.
    ``policy``: a file that says which requests other tiers may answer (:mod:`edge_runtime.policy`); it is read anew
    when it changes. ``offline``: tiers on other machines are off.
    ``prompt_lookup``: answers that repeat what was said before come faster. ``draft``: a smaller model of the same
    vocabulary, as a pruned one of this; it drafts where that is faster, which is measured while it runs, and answers
    stay this model's. ``draft_device``: None for the model's own (:mod:`edge_runtime.drafting`).
    ``prefix_cache_bytes``: KV cache that finished requests may go on holding (None: what running ones do not need).
    ``prefix_store_bytes`` (``"1GiB"``): disk for prefixes of prompts that were used twice, or are long when the model
    is closed; 0: none are written or read (:mod:`edge_runtime.prefix_store`).
    ``workload``: what ``auto`` and ``cpu`` choose a device for, by what ``edge-glm bench`` measured here
    (:data:`edge_runtime.measurements.Workload`). ``tuning``: whether to open the model as ``edge-glm tune`` found best
    for that, where nothing else is asked for here. ``step_timeout``: seconds after which a step of the model counts as
    hanging, more where steps are slow (:mod:`edge_runtime.step_watch`); 0 or None: never. ``name``: what requests to a
    server call it; None: as its package is called. ``progress`` hears of downloads and exports.

    **Prompts.** A list of messages goes through the model's chat template. A string is one user message of such a
    chat if the model has a chat template, else text to go on from. Token ids are taken as they are: to have an
    instruct model continue plain text, pass ``llm.tokenizer.encode(text)``.

    Raises UnknownReference, FetchError, UnsupportedModel, CorruptModel, StorageError, UnknownDevice,
    DeviceUnavailable, EngineError, BudgetError, ConfigError, PolicyError, LedgerError.
    """

    def __init__(
        self,
        ref: str,
        device: str = "auto",
        memory_budget: str | int | None = None,
        *,
        weights: WeightsWish | None = None,
        threads: int | None = None,
        kv_type: KVWish | None = None,
        max_sequences: int = DecoderOptions.max_sequences,
        max_prompt: int | None = None,
        batch_invariant: bool = False,
        prompt_lookup: bool = False,
        draft: str | None = None,
        draft_device: str | None = None,
        prefix_cache_bytes: int | None = None,
        prefix_store_bytes: str | int = DEFAULT_SIZE,
        workload: Workload = "one",
        fallback: bool = False,
        tuning: bool | Options = True,
        step_timeout: float | None = STEP_TIMEOUT_S,
        policy: str | Path | None = None,
        offline: bool = False,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        if workload not in WORKLOADS:
            raise ConfigError(f"workload is {', '.join(WORKLOADS)}, not {workload!r}")
        if step_timeout is not None and step_timeout < 0:
            raise ConfigError(f"step_timeout is a number of seconds, or 0 for none, not {step_timeout:g}")
        if max_prompt is not None and max_prompt < 1:
            raise ConfigError(f"max_prompt must be at least 1, not {max_prompt}")
        loading = Loading(
            budget=None if memory_budget is None else parse_budget(memory_budget),
            threads=threads,
            kv_type=kv_type,
            max_sequences=max_sequences,
            max_prompt=max_prompt,
            batch_invariant=batch_invariant,
            prompt_lookup=prompt_lookup,
            draft=draft,
            draft_device=draft_device,
            prefix_cache_bytes=prefix_cache_bytes,
            prefix_store_bytes=0 if prefix_cache_bytes == 0 else parse_bytes(prefix_store_bytes),
            workload=workload,
            tuning=tuning,
            step_timeout=step_timeout or None,
        )
        opened = open_model(Store(home()), ref, device, weights, fallback, loading, progress)
        self._created = int(time.time())
        self._name = name
        self.tokenizer = opened.tokenizer
        self._chats = opened.chats
        self._failover = opened.failover
        self.local = LocalModel(opened.failover, opened.switching)
        self._memory = MemoryWatch(lambda: self._failover.in_host_memory, opened.switching.relieve)
        self._tiers: Dispatcher | None = None
        if policy is not None:
            try:
                self._tiers = _dispatcher(Path(policy), self.local, offline, progress)
            except BaseException:
                self.close()
                raise

    # --- answers ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
    ) -> Completion:
        """The whole answer; Ctrl-C cancels it. ``tools``: what it may call, as OpenAI's API has them, for messages.

        Raises InvalidRequest, TemplateError, PromptTooLong, Overloaded, EngineStopped, DeviceError.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise InvalidRequest(f"generate gives one completion, not {params.n}; use stream for several", "n")
        with closing(self._stream(prompt, params, tools, tool_choice)) as chunks:
            return joined(chunks, chunks.route, lambda: chunks.timing)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
    ) -> ChunkStream:
        """The answer as it is made, an iterator of chunks; closing or dropping it cancels it. Calls of tools come in
        pieces, as ``chunk.extra["tool_calls"]``.

        Errors as for :meth:`generate`; those of the request raise here, at once.
        """
        return self._stream(prompt, params or SamplingParams(), tools, tool_choice)

    def defer(self, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """Have it answered later, by the tier that its class prefers; returns an id for :meth:`deferred`, once it
        is on the disk. Whatever process has a policy open answers it, also after this one has ended.

        ConfigError without a policy; QueueFull, InvalidRequest, StorageError.
        """
        return self._with_tiers().deferrals.add(TierRequest(self._kind_of(prompt), params or SamplingParams()))

    def deferred(self, id: str) -> Ticket | None:
        """How things stand with a deferred request, and its answer; None: there is none of this id."""
        return self._with_tiers().deferrals.get(id)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(vocab,) float32, after the last of ``ids``."""
        return self._failover.logits(ids)

    def score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(len(ids)-1,) float32: log p(ids[i+1] | ids[:i+1])."""
        return self._failover.score(ids)

    def switch(self, weights: WeightsWish) -> None:
        """Go on with other weights that the package has, between requests: what runs ends as it was begun, what comes
        meanwhile waits. Returns when they are open. ``auto``: see the class.

        ModelNotFound, and nothing has changed; BudgetError, EngineError and so on if they do not open, and what was
        open is open again; EngineStopped.
        """
        self.local.switch(weights)

    # --- what the server needs ----------------------------------------------------------------------------------------

    @property
    def model_id(self) -> str:
        return self.package.name if self._name is None else self._name

    @property
    def created(self) -> int:
        return self._created

    @property
    def ready(self) -> bool:
        return self._loaded.engine.alive

    @property
    def condition(self) -> Condition:
        return Condition(self._loaded.engine.failure, dict(self._failover.aside), self._memory.told)

    @property
    def stats(self) -> EngineStats:
        return self._loaded.engine.stats

    @property
    def kv_tokens(self) -> int:
        return self._loaded.engine.limits.kv_tokens

    @property
    def eos_ids(self) -> Sequence[int]:
        return self.tokenizer.eos_ids

    @property
    def tiers(self) -> Dispatcher | None:
        """What is made of the policy; None: there is none."""
        return self._tiers

    def start_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, about: About = NOTHING
    ) -> Generation:
        return self._start(TierRequest(Messages(messages), params, about))

    def start_completion(
        self, prompt: str | Sequence[int], params: SamplingParams, about: About = NOTHING
    ) -> Generation:
        asked = Text(prompt) if isinstance(prompt, str) else TokenIds(prompt)
        return self._start(TierRequest(asked, params, about))

    @property
    def facts(self) -> ModelFacts:
        return facts_of(self.package, self.variant)

    def tokenize(self, prompt: Messages | Text, add_bos: bool = True) -> list[int]:
        if isinstance(prompt, Text) and not add_bos:
            return self.tokenizer.encode(prompt.text)
        return list(self.local.prepare(TierRequest(prompt, SamplingParams())).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokenizer.token_bytes(token_id)

    # --- about --------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """``engine:device`` that is asked first, as really opened; another one once this one has failed."""
        return self._loaded.device

    @property
    def reason(self) -> str:
        """Why this device, and what tuning found for it, in words."""
        return self._loaded.reason

    @property
    def placement(self) -> Mapping[str, str]:
        """What it runs on, and why."""
        return {"device": self.device, "variant": self.variant.name, "reason": self.reason}

    @property
    def package(self) -> Package:
        return self._loaded.placement.package

    @property
    def variant(self) -> Variant:
        return self._loaded.placement.variant

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return max(each.max_context for each in self._failover.loaded)

    def close(self) -> None:
        """End every request and free the model. Idempotent."""
        if self._tiers is not None:
            self._tiers.close()
        self._memory.close()
        self._failover.close()
        return_free_heap()

    def __enter__(self) -> EdgeLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _with_tiers(self) -> Dispatcher:
        if self._tiers is None:
            raise ConfigError("there is no policy, so nothing is deferred: open the model with one")
        return self._tiers

    def _stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any],
    ) -> ChunkStream:
        asked = self._kind_of(prompt)
        if tools and not isinstance(asked, Messages):
            raise InvalidRequest("tools need messages, and a model with a chat template", "tools")
        extras = {"tools": list(tools), "tool_choice": tool_choice} if tools else {}
        request = TierRequest(asked, params, About(extras=extras))
        if tracing.current() is not None:  # the caller's own
            return ChunkStream(self._start(request))
        lane = tracing.Trace().lane("caller")
        token = tracing.enter(lane)
        try:
            return ChunkStream(self._start(request), lane)
        finally:
            tracing.leave(token)

    @property
    def _loaded(self) -> Loaded:
        """On the device that is asked first."""
        return self._failover.loaded[0]

    def _start(self, request: TierRequest) -> Generation:
        if self._tiers is not None:
            return self._tiers.start(request)
        return self.local.start(self.local.prepare(request))

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


def _dispatcher(policy: Path, model: LocalModel, offline: bool, progress: Progress | None) -> Dispatcher:
    from edge_runtime.routing.dispatcher import Dispatcher  # late: it brings asyncio and an HTTP client

    def open_beside(tier: LocalTierSpec) -> EdgeLLM:
        assert tier.model is not None
        return EdgeLLM(tier.model, tier.device, tier.memory_budget, weights=tier.weights, progress=progress)

    return Dispatcher(policy, model, open_beside, home(), offline)
