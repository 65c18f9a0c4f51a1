"""How long one request will take to its first token, on an engine as it stands."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.timing.model import Beside, Estimate, TimingModel


@dataclass(frozen=True)
class PredictedTTFT:
    """Of a request, with what the estimate rests on."""

    first_token: Estimate
    prompt: int
    """Tokens."""
    cached: int
    """Of them, those that are known already."""
    beside: Beside

    @property
    def ms(self) -> float:
        return 1e3 * self.first_token.seconds

    def __str__(self) -> str:
        known = f", {self.cached} of them known" if self.cached else ""
        others = f", after {sum(self.beside.prompts)} tokens of others" if self.beside.prompts else ""
        decoding = f", beside {self.beside.decoding} answers" if self.beside.decoding else ""
        return f"about {self.first_token} for {self.prompt} tokens{known}{others}{decoding}"


def predict_ttft(model: TimingModel, prompt: int, cached: int, beside: Beside) -> PredictedTTFT:
    """``cached``: a guess, cut to what a prompt can have known of it."""
    known = max(min(cached, prompt - 1), 0)
    return PredictedTTFT(model.ttft(prompt, known, beside), prompt, known, beside)
