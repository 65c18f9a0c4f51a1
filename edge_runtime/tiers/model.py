"""The tier in this process: a model on whatever device and with whatever variant it is just open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edge_runtime.errors import EdgeError
from edge_runtime.failover import Failover
from edge_runtime.generation import Generation
from edge_runtime.package import WeightsWish
from edge_runtime.prompts import Fit, TierRequest, TokenIds
from edge_runtime.switching import Switching
from edge_runtime.timing.model import Beside
from edge_runtime.timing.ttft import PredictedTTFT, predict_ttft


class LocalModel:
    """Methods may be called from any thread."""

    def __init__(self, failover: Failover, switching: Switching) -> None:
        self._failover = failover
        self._switching = switching

    @property
    def names(self) -> tuple[str, ...]:
        """What the model is called: here, by its maker and where it comes from."""
        manifest = self._failover.loaded[0].placement.package.manifest
        said = (manifest.provenance.get(key) for key in ("name", "source"))
        return manifest.name, *(str(each) for each in said if each)

    def prepare(self, request: TierRequest) -> TierRequest:
        """The same request as token ids: the prompt is the same on every device. TemplateError, InvalidRequest."""
        return self._failover.loaded[0].tier.prepare(request)

    def unsupported(self, request: TierRequest) -> str | None:
        """Why no answer to it can be given here, whenever; None: one can."""
        return self._failover.loaded[0].tier.unsupported(request)

    def fit(self, prepared: TierRequest) -> Fit:
        """On the roomiest device."""
        fits = [each.tier.fit(prepared) for each in self._failover.loaded]
        fit = max(fits, key=lambda fit: (fit.max_prompt, fit.max_context))
        room = self._switching.most_context
        return fit if room is None else replace(fit, max_prompt=max(room, fit.max_prompt), max_context=room)

    def predicted_ttft(self, prepared: TierRequest) -> PredictedTTFT | None:
        """How long it will take to the first token, with what the engine has to do just now. None: it was not measured,
        or it must wait for the end of another answer, whose length nobody knows."""
        fitting = (each for each in self._failover.loaded if each.tier.fit(prepared).verdict(prepared.params)[0])
        loaded = next(fitting, None)
        if loaded is None or loaded.timing is None:
            return None
        engine = loaded.engine
        stats = engine.stats
        if stats.running + stats.waiting >= engine.limits.max_sequences:
            return None
        beside = Beside(stats.running + stats.waiting, stats.running_tokens, stats.pending)
        return predict_ttft(loaded.timing, len(prepared.ids), engine.known(prepared.ids), beside)

    def start(self, prepared: TierRequest) -> Generation:
        """See :meth:`edge_runtime.switching.Switching.start`."""
        return self._switching.start(prepared)

    def switch(self, weights: WeightsWish) -> None:
        """See :meth:`edge_runtime.switching.Switching.switch`."""
        self._switching.switch(weights)

    def go_on(self, prepared: TierRequest, text: str) -> TierRequest:
        """The request to go on from ``text``, with which its answer has begun. EdgeError where there is no room."""
        return continued(prepared, text, self._failover.loaded[0].tier.encode_text(text))


def continued(prepared: TierRequest, text: str, ids: Sequence[int]) -> TierRequest:
    """``prepared`` once its answer has begun with ``text``, which is ``ids``. EdgeError where there is no room."""
    params = prepared.params
    if params.max_tokens is not None:
        if len(ids) >= params.max_tokens:
            raise EdgeError(f"{params.max_tokens} tokens were asked for, and as many have come")
        params = replace(params, max_tokens=params.max_tokens - len(ids))
    if params.grammar is not None:
        params = replace(params, grammar=replace(params.grammar, begun=params.grammar.begun + text))
    return replace(prepared, prompt=TokenIds([*prepared.ids, *ids]), params=params)
