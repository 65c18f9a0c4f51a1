"""From the timing model to the tier that answers, through a policy."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.timing.model import TimingModel
from tests.tiers.house import GREEDY, LOCAL, cloud, house, task
from tests.tiers.upstream import answers, upstream
from tests.timing.known import CHUNK, observed

LONG = [{"role": "user", "content": "what is it? " * 25}]


def test_a_prompt_that_would_take_too_long_here_goes_elsewhere(tmp_path: Path) -> None:
    policy = LOCAL + task(latency={"ttft": 100.0}, escalate=False)
    with upstream(answers("from ", "afar")) as server, house(tmp_path, policy + cloud(server.url)) as here:
        assert here.ask().tiers == ["local"]
        assert here.ask(LONG).tiers == ["local"]  # nothing was measured
        here.local.timing = TimingModel(observed(), CHUNK)
        near, far = here.ask(), here.ask(LONG)
        assert near.tiers == ["local"]
        assert far.text == "from afar"
        reason = far.route.reasons["local"]
        assert reason.startswith("its first token will take about ")
        assert reason.endswith("the class wants 100 ms")
        assert (far.route.wanted_ttft_ms, far.route.wanted_total_ms) == (100.0, None)


def test_privacy_is_worth_more_than_time(tmp_path: Path) -> None:
    policy = LOCAL + task(latency={"ttft": 1.0}, privacy="local-only")
    with upstream(answers("from ", "afar")) as server, house(tmp_path, policy + cloud(server.url)) as here:
        here.local.timing = TimingModel(observed(), CHUNK)
        found = here.ask(LONG)
        assert found.tiers == ["local"]
        assert "the class wants 1 ms" in found.route.reason
        assert GREEDY.max_tokens == found.usage.completion_tokens or found.chunks[-1].finish_reason == "stop"


def test_a_class_without_a_target_is_not_weighed(tmp_path: Path) -> None:
    with house(tmp_path, LOCAL + task()) as here:
        here.local.timing = TimingModel(observed(), CHUNK)
        assert "will take" not in here.ask(LONG).route.reason
