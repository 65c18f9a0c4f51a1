"""Who runs next. Also hands out sequences and takes them back, since places and KV cache decide who may run."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress

import msgspec
import numpy as np

from devices.base import Decoder, DecoderSequence, KVChoosing, Step
from edge_runtime.completion import Completion, Request
from edge_runtime.drafting.draft_model import DraftModel
from edge_runtime.errors import DeviceError, EdgeError, EngineError, OutOfKVCache, OutOfSequences
from edge_runtime.memory import format_bytes
from edge_runtime.precision import PrecisionManager
from edge_runtime.prefix_cache import PrefixCache
from edge_runtime.request import Kind
from edge_runtime.tracing.trace import Part

DRAFTED_STEP = 16
"""Tokens of all decoding requests in one step, drafts included; beyond, checking drafts costs what it gains."""


class Work(msgspec.Struct, frozen=True):
    """One request's part in a batch: its next tokens."""

    request: Request
    start: int
    """Tokens in its KV cache before."""
    step: Step
    draft: Sequence[int] = ()
    """The step's last tokens: what may come next, to be checked."""
    by_model: bool = False
    """The draft is a :class:`~edge_runtime.drafting.draft_model.DraftModel`'s."""

    @property
    def part(self) -> Part:
        """What its time is spent on. In pairs a decode step feeds two tokens; a preempted request is prefilled anew."""
        tokens = len(self.request.tokens)
        return "decode" if tokens > self.request.prompt_length and tokens - self.start <= 2 else "prefill"


class NotStarted(Exception):
    """The device gave a request no sequence, which is among those that run now, without one."""

    def __init__(self, request: Request, error: EngineError) -> None:
        super().__init__(str(error))
        self.request = request
        self.error = error


class Scheduler:
    """First come, first served, over a decoder's places and KV cache. Belongs to the decoder's thread.

    Each batch has every decoding request and at most one chunk of one prompt, so that a long prompt holds nobody's
    next token back for more than a chunk. When the KV cache runs out, cached prefixes go first; then the youngest
    request gives its sequence up and is computed again later, its output so far included.
    """

    def __init__(
        self, decoder: Decoder, cache: PrefixCache, *, in_pairs: bool = False, drafter: DraftModel | None = None
    ) -> None:
        """``in_pairs``: never feed a single token, but the one before it once more as well. Engines compute two or more
        tokens bit for bit alike however many they are, so nothing but the tokens then decides an answer: neither other
        requests nor drafts. A device that computes a single one like that too is fed as ever. ``drafter``: drafts where
        a request itself has none.
        """
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self.kv_limit: int | None = None
        """Bytes of KV cache that requests may have for now, where that is less than there is."""
        self._decoder = decoder
        self._cache = cache
        self._drafter = drafter
        self._limits = decoder.limits
        self._precision = PrecisionManager(decoder.limits)
        self._in_pairs = in_pairs and not decoder.limits.invariant
        self._apart: dict[Request, int] = {}
        """Requests whose step has failed, and the tokens that they had then. They run alone, one after the other, until
        they have more."""
        self._crowded = False
        """A request was preempted; admit nobody until one has left, or both would take turns evicting each other."""

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def next(self) -> list[Work]:
        """The next batch; empty when there is nothing to run. May finish requests that cannot be started. NotStarted,
        DeviceError."""
        if self._limits.rope_switch is not None:
            self._switch_rope(self._limits.rope_switch)
        if self.kv_limit is not None:
            self._keep_within()
        if self._apart and (alone := self._next_apart()):
            return alone
        if self.waiting:
            self._admit_waiting()
        decoding, prefill = [], None
        for request in self.running:
            pending = request.pending
            if pending == 1:
                decoding.append(request)
            elif pending > 1 and prefill is None:
                prefill = request
        batch = self._drafted(decoding)
        if prefill is not None:
            batch.append(self._prefill(prefill))
        return batch

    def _drafted(self, decoding: Sequence[Request]) -> list[Work]:
        spare = DRAFTED_STEP // max(len(decoding), 1) - 1
        own = {request: request.draft(spare) for request in decoding}
        others: Mapping[Request, Sequence[int]] = {}
        if self._drafter is not None:
            others = self._drafter.draft(
                {each: min(spare, each.draftable) for each in decoding if not own[each] and each.draftable}
            )
        return [
            self._decode(request, others.get(request, ()), by_model=True)
            if others.get(request)
            else self._decode(request, own[request])
            for request in decoding
        ]

    def _decode(self, request: Request, draft: Sequence[int] = (), by_model: bool = False) -> Work:
        """The newest token, and the draft after it."""
        assert request.sequence is not None
        if self._in_pairs and not draft and request.fed:
            request.sequence.crop(request.fed - 1)
            return self._prefill(request)
        tokens = np.array([request.tokens[-1], *draft], np.int64)
        return Work(request, len(request.tokens) - 1, Step(request.sequence, tokens, len(tokens)), draft, by_model)

    def _prefill(self, request: Request) -> Work:
        """The next tokens that it knows already."""
        assert request.sequence is not None
        start = request.fed
        length = request.chunk(self._limits.prefill_chunk)
        tokens = np.array(request.tokens[start : start + length], np.int64)
        return Work(request, start, Step(request.sequence, tokens, request.rows(length)))

    def fork(self, parent: Request, child: Completion) -> bool:
        """Start ``child`` from ``parent``'s prefill; if there is no room now, it is queued like any other.

        Returns whether ``child`` can take ``parent``'s logits.
        """
        assert parent.sequence is not None
        child.kind = parent.kind
        try:
            if self._places() == 0:
                self._cache.evict()
            child.sequence = parent.sequence.fork(parent.prompt_length)
        except DeviceError:  # whatever it is, it can be computed anew
            self.waiting.appendleft(child)  # its turn came with its parent's
            return False
        self.running.append(child)
        return True

    def make_room(self, batch: list[Work], error: OutOfKVCache) -> list[Work]:
        """After OutOfKVCache: free some KV cache and return what is left of ``batch``."""
        if any(work.draft for work in batch):
            return [self._decode(work.request) if work.draft else work for work in batch]
        if self._cache.evict():
            return batch
        youngest = _youngest([each for each in self.running if each not in self._apart] or self.running)
        if len(self.running) > 1:
            self._preempt(youngest)
        elif len(youngest.tokens) > youngest.prompt_length:
            youngest.finish("length")  # alone, it has filled all there is
            self.release(youngest, keep=False)
        else:
            youngest.finish("error", error)
            self.release(youngest, keep=False)
        return [work for work in batch if work.request is not youngest]

    def set_apart(self, requests: Sequence[Request]) -> None:
        """A step of theirs has failed, which leaves their sequences undefined: they are computed anew, each alone."""
        for request in list(requests):
            if request in self.running:
                self._put_back(request)
                self._apart[request] = len(request.tokens)

    def give_way(self) -> bool:
        """Drop the prefix that was not used for longest; False: there is none."""
        return self._cache.evict()

    def is_apart(self, request: Request) -> bool:
        """Its step has failed, and it has not got over that yet."""
        return request in self._apart

    def release(self, request: Request, keep: bool) -> None:
        """Take a finished request out; ``keep`` its sequence for prompts that begin alike."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
            self._crowded = False
        self._apart.pop(request, None)
        if self._drafter is not None:
            self._drafter.release(request)
        sequence, request.sequence = request.sequence, None
        if sequence is None:
            return
        if keep:
            tokens = request.tokens[: sequence.length]
            self._cache.put(tokens, sequence, request.kind, wanted=request.reused)
        else:
            _close(sequence)

    def forget(self) -> None:
        """There is nobody any more; their sequences die with the decoder."""
        self.waiting.clear()
        self.running.clear()
        self._apart.clear()

    def _next_apart(self) -> list[Work]:
        """The next step of a request that has to run alone; the others keep what they have, and wait. Nothing: there is
        no such request any more."""
        for request, tokens in list(self._apart.items()):
            if len(request.tokens) > tokens:
                del self._apart[request]
            elif request in self.running or self._start_apart(request):
                return [self._decode(request) if request.pending == 1 else self._prefill(request)]
        return []

    def _start_apart(self, request: Request) -> bool:
        """At others' cost, if need be. False: it has ended with an error."""
        while self.running and not (self._fits(request) and self._start(request)):
            self._preempt(_youngest(self.running))
        if request.sequence is None and not request.finished:
            self._start(request)
        return request.sequence is not None

    def _admit_waiting(self) -> None:
        """As many as there is room for, one prompt after the other."""
        while self.waiting and not any(request.pending > 1 for request in self.running):
            if not self._admit(self.waiting[0]):
                break

    def _admit(self, request: Request) -> bool:
        if self.running and (self._crowded or not self._fits(request)):
            return False
        return self._start(request)

    def _fits(self, request: Request) -> bool:
        """Beside those that run."""
        free = self._free_bytes()
        needed = (len(request.tokens) + 1) * self._limits.bytes_per_token(self._kind(request, free).kv_type)
        return needed <= free and len(self.running) < self._limits.max_sequences

    def _free_bytes(self) -> int:
        """Of KV cache, by what running requests hold."""
        bytes_per_token = self._limits.bytes_per_token
        held = (bytes_per_token(other.kind.kv_type) * (len(other.tokens) + 1) for other in self.running)
        most = self._limits.kv_bytes
        return (most if self.kv_limit is None else min(most, self.kv_limit)) - sum(held)

    def _keep_within(self) -> None:
        """The limit, which has come to be lower than what runs: the youngest wait until there is room again, and one
        that is alone ends where it is."""
        while self.running and self._free_bytes() < 0:
            youngest = _youngest(self.running)
            if len(self.running) > 1:
                self._preempt(youngest)
                continue
            if len(youngest.tokens) > youngest.prompt_length:
                youngest.finish("length")
            else:
                youngest.finish("error", self._too_little(youngest))
            self.release(youngest, keep=False)

    def _too_little(self, request: Request) -> OutOfKVCache:
        return OutOfKVCache(
            f"memory has become short: {format_bytes(self.kv_limit or 0)} are left for the KV cache, and "
            f"{len(request.tokens)} tokens need more; try a shorter prompt, or again later"
        )

    def _start(self, request: Request) -> bool:
        """Out of those that wait. False: there is no place. It may end with an error. NotStarted."""
        request.kind = self._kind(request, self._free_bytes())
        if request.lane is not None:
            request.lane.mark("queue")
        if self.kv_limit is not None and not self.running and not self._fits(request):
            self.waiting.remove(request)
            request.finish("error", self._too_little(request))
            return True
        try:
            request.sequence = self._open(request)
        except EngineError as error:
            self.waiting.remove(request)
            self.running.append(request)
            raise NotStarted(request, error) from error
        except DeviceError as error:
            if isinstance(error, OutOfSequences) and self.running:
                return False
            self.waiting.remove(request)
            request.finish("error", error)
            return True
        if request.lane is not None:
            request.lane.mark("prefix lookup")
        self.waiting.remove(request)
        self.running.append(request)
        request.reused = request.fed
        self._crowded = self._crowded and len(self.running) > 1
        if isinstance(request, Completion) and request.index == 0 and len(request.tokens) == request.prompt_length:
            request.outlet.set_cached(request.fed)
        return True

    def _open(self, request: Request) -> DecoderSequence:
        """A sequence for ``request``, with the longest known prefix of its tokens in it."""
        if isinstance(request, Completion):
            known = self._fork_running(request)
            if known is None:
                known = self._cache.acquire(request.tokens, self._places() > 0, request.kind)
            if known is None:
                known = self._new_sequence(request)
            self._cache.extend(known, request.tokens, request.kind)
            return known
        if self._places() == 0:
            self._cache.evict()
        return self._new_sequence(request)

    def _new_sequence(self, request: Request) -> DecoderSequence:
        expected, kv_type = len(request.tokens), request.kind.kv_type
        if kv_type is None:
            return self._decoder.new_sequence(expected)
        assert isinstance(self._decoder, KVChoosing)
        return self._decoder.new_sequence_in(kv_type, expected)

    def _kind(self, request: Request, free: int) -> Kind:
        """What it is to be, where ``free`` bytes of KV cache are left."""
        tokens, switch = request.tokens, self._limits.rope_switch
        long_rope = switch is not None and len(tokens) > switch
        if request.kind.kv_type is not None or not self._limits.kv_choices:
            return Kind(long_rope, request.kind.kv_type)
        known = (
            each.kv_type
            for each in self._limits.kv_choices
            if 2 * self._cache.match(tokens, Kind(long_rope, each.kv_type)) > len(tokens)
        )
        return Kind(long_rope, self._precision.choose(len(tokens) + 1, free, next(known, None)))

    def _fork_running(self, request: Request) -> DecoderSequence | None:
        """A fork of a running sequence, if one begins like ``request``, and longer than anything in the cache."""
        best: tuple[DecoderSequence | None, int] = (None, self._cache.match(request.tokens, request.kind))
        for other in self.running:
            if other.sequence is not None and other.kind == request.kind:
                common = self._cache.usable(np.asarray(other.tokens[: other.fed], np.int64), request.tokens)
                if common > best[1]:
                    best = (other.sequence, common)
        if best[0] is None:
            return None
        try:
            if self._places() == 0:
                self._cache.evict()
            return best[0].fork(best[1])
        except DeviceError:
            return None

    def _switch_rope(self, switch: int) -> None:
        """Longrope: a sequence about to pass the switch is computed anew with the long factors, from the start."""
        for request in self.running:
            if not request.kind.long_rope and len(request.tokens) > switch and request.sequence is not None:
                request.sequence.close()
                request.kind = request.kind._replace(long_rope=True)
                request.sequence = self._new_sequence(request)

    def _preempt(self, request: Request) -> None:
        self._put_back(request)
        self._crowded = True
        self.preemptions += 1

    def _put_back(self, request: Request) -> None:
        """To those that wait, in its turn; it is computed anew."""
        if request.sequence is not None:
            _close(request.sequence)
            request.sequence = None
        if self._drafter is not None:
            self._drafter.release(request)
        self.running.remove(request)
        place = sum(other.id < request.id for other in self.waiting)
        self.waiting.insert(place, request)

    def _places(self) -> int:
        return self._limits.max_sequences - len(self.running) - len(self._cache)


def _youngest(requests: Sequence[Request]) -> Request:
    return max(requests, key=lambda request: request.id)


def _close(sequence: DecoderSequence) -> None:
    with suppress(EdgeError):  # of a device that has failed, and then nothing depends on it
        sequence.close()
