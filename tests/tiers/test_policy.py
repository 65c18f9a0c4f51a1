"""The policy file: read strictly, checked for contradictions, read anew when it changes."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from edge_runtime.errors import PolicyError
from edge_runtime.facts import Facts
from edge_runtime.grammar import Grammar
from edge_runtime.policy import language
from edge_runtime.policy.check import problems
from edge_runtime.policy.rules import read_policy
from edge_runtime.prompts import About, Messages, TierRequest
from edge_runtime.routing import dispatcher
from edge_runtime.routing.matching import Matcher
from tests.server.served import wait_until
from tests.tiers.house import GREEDY, LOCAL, QUESTION, cloud, house, task
from tests.tiers.upstream import answers, upstream

CLOUD = cloud("https://api.example.com/v1")


needs_cld2 = pytest.mark.skipif(find_spec("pycld2") is None, reason="languages need pycld2 (the language extra)")


def wrong(tmp_path: Path, policy: str) -> str:
    path = tmp_path / "policy.toml"
    path.write_text(policy, encoding="utf-8")
    return "; ".join(problems(read_policy(path)))


def refused(tmp_path: Path, policy: str) -> str:
    path = tmp_path / "policy.toml"
    path.write_text(policy, encoding="utf-8")
    with pytest.raises(PolicyError) as error:
        read_policy(path)
    return str(error.value)


def test_a_full_policy_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's."""
    policy = (Path(__file__).parents[2] / "samples" / "policy.toml").read_text(encoding="utf-8")
    monkeypatch.setenv("CLOUD_KEY", "key-of-a-test")
    assert wrong(tmp_path, policy) == ""


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (LOCAL + "colour = 1\n", "colour"),
        ("tiers = 3\n", "tiers"),
        ('[[tiers]]\nname = "x"\nkind = "cloudy"\n', "cloudy"),
        ('[[tiers]]\nname = "x"\nkind = "openai"\n', "base_url"),
        (LOCAL + '[[classes]]\nname = "a"\nprivacy = "sometimes"\n', "sometimes"),
        (LOCAL + '[[classes]]\nname = "a"\nmatch = {token = {min = 1}}\n', "token"),
        ("classes = []\n", "tiers"),
        ("[[tiers]\n", "cannot read"),
        ("x = " + "9" * 5000, "cannot read"),
        ("x = " + "[" * 10_000 + "]" * 10_000, "cannot read"),
    ],
)
def test_what_there_is_not_is_named(policy: str, said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, policy)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("tiers = []\n", "no tiers"),
        (LOCAL + LOCAL, "there twice"),
        (LOCAL.replace('"local"', '"Local One"', 1), "lower-case"),
        (LOCAL + LOCAL.replace('"local"', '"other"', 1), "same model"),
        (cloud("ftp://x/v1"), "base_url must be like"),
        (cloud("https://user:secret@x/v1"), "keys go into"),
        (cloud("https://x/v1", api_key_env="NO_SUCH_KEY_HERE"), "NO_SUCH_KEY_HERE with its key is not set"),
        (cloud("https://x/v1", api_key_file="/no/such/file"), "cannot be read from /no/such/file"),
        (cloud("https://x/v1", api_key_file="~no such user/key"), "cannot be read from ~no such user/key"),
        (cloud("https://x/v1", api_key_file="a-b").replace("a-b", "a\\u0000b"), "embedded null byte"),
        (cloud("https://x/v1", ca_file="~no such user/ca"), "there is no file ~no such user/ca"),
        (cloud("https://x/v1", context=10, max_output=20), "leaves no room"),
        (cloud("https://x/v1", timeouts={"connect": 0}), "timeouts.connect must be over 0"),
        (cloud("https://x/v1", price={"input": -1}), "price.input must not be negative"),
        (cloud("https://x/v1", ca_file="/no/such.pem"), "/no/such.pem"),
        (LOCAL + task(tiers=["cloudy"]), "there is no tier cloudy; there is local"),
        (LOCAL + task(tiers=[]), "tiers is empty"),
        (LOCAL + task(tiers=["local", "local"]), "named twice"),
        (LOCAL + CLOUD + task(tiers=["cloud"], privacy="local-only"), "cloud is not on this device"),
        (CLOUD + task(privacy="local-only"), "there is no local tier"),
        (CLOUD + task(broken_stream="continue"), "needs a local tier"),
        (LOCAL + task() + task(name="b", match={"keywords": ["x"]}), "class b is never reached: class all"),
        (
            LOCAL
            + task(name="a", match={"tokens": {"min": 5}})
            + task(name="b", match={"tokens": {"min": 9, "max": 20}, "keywords": ["x"]}),
            "class b is never reached: class a",
        ),
        (
            LOCAL
            + task(name="a", match={"keywords": ["x", "y"]})
            + task(name="b", match={"keywords": ["x"], "header": {"a": "b"}}),
            "class b is never reached",
        ),
        (LOCAL + task(match={"tokens": {"min": 9, "max": 2}}), "no prompt has 9 to 2 tokens"),
        (LOCAL + task(match={"keywords": []}), "keywords must hold words"),
        (LOCAL + task(match={"field": {"password": "x"}}), "match.field knows"),
        (LOCAL + task(match={"header": {"a b": "x"}}), "no name of a header"),
        (LOCAL + task(match={"regex": "(unclosed"}), "is no pattern"),
        (LOCAL + task(match={"regex": "(?=ahead)"}), "look-around"),
        (LOCAL + task(match={"regex": "(a{1000}){1000}"}), "is no pattern"),
        (LOCAL + task(match={"regex": "x" * 2000}), "1 to 1000 characters"),
        (LOCAL + task(cost_cap={"day": -1}), "cost_cap.day"),
        (LOCAL + "[caps]\nmonth = -2\n", "month"),
        (LOCAL + "[deferred]\nmax_age_hours = 0\n", "max_age_hours"),
        (LOCAL + "[routing]\nthreshold = 2\n", "threshold is a probability"),
        (LOCAL + "[routing]\nforks = 1\n", "forks must be"),
        (LOCAL + '[privacy]\npatterns = [{name = "a b", regex = "x"}]\n', "letters and digits"),
        (LOCAL + '[privacy]\npatterns = [{name = "ab", regex = "["}]\n', "is no pattern"),
        (LOCAL + '[privacy]\nphone_region = "germany"\n', "country such as DE"),
        (LOCAL + task(name="unmatched"), "choose another name"),
    ],
)
def test_contradictions_are_named(policy: str, said: str, tmp_path: Path) -> None:
    assert said in wrong(tmp_path, policy)


@needs_cld2
def test_languages_are_known(tmp_path: Path) -> None:
    assert "'klingon' is no language code" in wrong(tmp_path, LOCAL + task(match={"languages": ["klingon"]}))
    assert "languages is empty" in wrong(tmp_path, LOCAL + task(match={"languages": []}))
    assert wrong(tmp_path, LOCAL + task(match={"languages": ["de", "en"]})) == ""


def test_without_cld2_languages_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "_cld2", lambda: None)
    assert "pip install 'edge-glm[language]'" in wrong(tmp_path, LOCAL + task(match={"languages": ["de"]}))
    assert language.language_of("Warum ist der Himmel heute so blau?") is None


def test_classes_that_can_be_reached_pass(tmp_path: Path) -> None:
    policy = (
        LOCAL
        + task(name="a", match={"keywords": ["x"], "tokens": {"max": 50}})
        + task(name="b", match={"keywords": ["x"]})
        + task(name="c", match={"header": {"a": "1"}})
        + task(name="d", match={"header": {"a": "2"}})
        + task(name="e")
    )
    assert wrong(tmp_path, policy) == ""


def test_no_message_holds_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-very secret")
    (tmp_path / "key").write_text("sk-also\nsecret")
    for options in ({"api_key_env": "SOME_KEY"}, {"api_key_file": str(tmp_path / "key")}):
        said = wrong(tmp_path, cloud("https://x/v1", **options))
        assert "not printable ASCII on one line" in said
        assert "secret" not in said


# --- a running policy -------------------------------------------------------------------------------------------------


def test_a_change_holds_from_the_next_request(tmp_path: Path) -> None:
    with upstream(answers("from afar")) as server:
        away = cloud(server.url) + LOCAL + task(prefer="remote")
        with house(tmp_path, away) as here:
            assert here.ask().tiers == ["cloud"]
            here.write(away.replace('privacy = "any"', 'privacy = "local-only"'))
            assert here.ask().tiers == ["local"]
            here.write(away + "# as before\n")
            assert here.ask().tiers == ["cloud"]


@pytest.mark.parametrize(
    "broken", ["not = [toml", "", LOCAL + task(tiers=["nowhere"]), LOCAL + 'stages = ["nonsense"]\n']
)
def test_a_broken_policy_changes_nothing(broken: str, tmp_path: Path) -> None:
    with upstream(answers("from afar")) as server:
        policy = cloud(server.url) + LOCAL + task(prefer="remote")
        with house(tmp_path, policy) as here:
            here.write(broken if not broken.startswith(LOCAL + "stages") else 'stages = ["nonsense"]\n' + LOCAL)
            assert here.ask().tiers == ["cloud"]
            assert here.dispatcher.problem
            assert here.dispatcher.health()["policy"] == here.dispatcher.problem
            here.path.unlink()
            assert here.ask().tiers == ["cloud"]
            here.write(policy.replace("remote", "local"))
            assert here.ask().tiers == ["local"]
            assert here.dispatcher.problem is None


def test_a_policy_that_was_cut_off_is_refused_wherever_that_was(tmp_path: Path) -> None:
    """What is left of this one would send everything away, were it cut before the last line."""
    whole = (
        f'ends_with = "# end"\n{LOCAL}{CLOUD}[[classes]]\nname = "all"\nprivacy = "any"\nmatch.regex = "^x"\n# end\n'
    )
    path = tmp_path / "policy.toml"
    for length in range(len(whole)):
        path.write_text(whole[:length], encoding="utf-8")
        with pytest.raises(PolicyError, match=re.escape(str(path))):
            read_policy(path)
    path.write_text(whole, encoding="utf-8")
    assert read_policy(path).classes[0].match.regex == "^x"


def test_without_an_end_that_it_names_it_is_refused_within_a_line(tmp_path: Path) -> None:
    assert "line break" in refused(tmp_path, LOCAL + "[caps]\nday = 10")


def test_a_running_answer_ends_under_the_policy_it_began_with(tmp_path: Path) -> None:
    with upstream(answers("one ", "two ", "three")) as server:
        policy = cloud(server.url) + LOCAL + task(prefer="remote")
        with house(tmp_path, policy) as here, here.start() as generation:
            text = next(generation).text
            here.write(LOCAL)
            assert here.ask().tiers == ["local"]
            assert text + "".join(chunk.text for chunk in generation) == "one two three"


def test_another_local_model_beside_the_first(tmp_path: Path) -> None:
    with house(tmp_path, LOCAL) as here:
        other = '[[tiers]]\nname = "large"\nkind = "local"\nmodel = "some/model"\n'
        here.write(LOCAL + other + task(tiers=["large"], privacy="local-only"))
        assert here.ask().tiers == ["large"]
        assert len(here.beside) == 1
        here.write(LOCAL + other + task(tiers=["large", "local"], privacy="local-only", prefer="order"))
        assert here.ask().tiers == ["large"]
        assert len(here.beside) == 1  # it was open already


def test_what_an_old_policy_had_open_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "GRACE_S", 0.05)
    other = '[[tiers]]\nname = "large"\nkind = "local"\nmodel = "some/model"\n'
    with upstream(answers("from afar")) as server:
        policy = cloud(server.url) + LOCAL + other + task(prefer="remote", tiers=["cloud", "large"])
        with house(tmp_path, policy) as here:
            assert here.ask().tiers == ["cloud"]
            (large,) = here.beside
            with here.start() as running:
                next(running)
                here.write(LOCAL)
                assert here.ask().tiers == ["local"]
            wait_until(lambda: not large.fake.engine.alive)
            assert here.ask().tiers == ["local"]


# --- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "question", "about", "holds"),
    [
        ({"keywords": ["Pump", "heat"]}, "is the PUMP on?", About(), True),
        ({"keywords": ["pump"]}, "are pumps on?", About(), False),
        ({"keywords": ["wärme"]}, "Die Wärme, bitte", About(), True),
        ({"regex": r"B-\d{3}"}, "where is B-123?", About(), True),
        ({"regex": r"(a+)+$"}, "a" * 300 + "!", About(), False),
        ({"tokens": {"max": 10}}, "long enough to be over", About(), False),
        ({"header": {"X-Task": "note"}}, "x", About(headers={"x-task": "note"}), True),
        ({"metadata": {"task": "note"}}, "x", About(metadata={"task": "other"}), False),
        ({"field": {"user": "anna"}}, "x", About(fields={"user": "anna"}), True),
        pytest.param(
            {"languages": ["de"]}, "Warum ist der Himmel heute so blau und schön?", About(), True, marks=needs_cld2
        ),
        pytest.param(
            {"languages": ["de"]}, "Why is the sky so blue and beautiful today?", About(), False, marks=needs_cld2
        ),
        ({"schema": True}, "x", About(), False),
        ({"schema": False}, "x", About(), True),
        ({"keywords": ["x"], "header": {"a": "b"}}, "x", About(), False),
    ],
)
def test_a_class_takes_what_it_says(
    match: dict[str, object], question: str, about: About, holds: bool, tmp_path: Path
) -> None:
    policy = LOCAL + cloud("http://localhost:9/v1") + task(name="wanted", match=match) + task(name="rest")
    with house(tmp_path, policy) as here:
        decision = here.dispatcher.decide(TierRequest(Messages([{"role": "user", "content": question}]), GREEDY, about))
        assert decision.task.name == ("wanted" if holds else "rest")
        assert decision.route.because


def test_a_class_may_take_what_asks_for_json(tmp_path: Path) -> None:
    policy = LOCAL + task(name="wanted", match={"schema": True}) + task(name="rest")
    with house(tmp_path, policy) as here:
        for grammar, name in ((Grammar.json_object(), "wanted"), (Grammar.regex("yes|no"), "rest"), (None, "rest")):
            params = replace(GREEDY, grammar=grammar)
            assert here.dispatcher.decide(TierRequest(Messages(QUESTION), params)).task.name == name


def test_what_no_class_takes_stays_here(tmp_path: Path) -> None:
    with house(tmp_path, cloud("http://localhost:9/v1") + LOCAL + task(match={"keywords": ["pump"]})) as here:
        answer = here.ask(QUESTION)
        assert answer.tiers == ["local"]
        assert answer.route.task_class == "unmatched"
        assert "local-only" in answer.route.reasons["cloud"]


def test_a_pattern_takes_no_longer_than_the_text(tmp_path: Path) -> None:
    policy = LOCAL + task(match={"regex": r"(a|aa|a?)+$"}, privacy="local-only")
    with house(tmp_path, policy) as here:
        matcher = Matcher(read_policy(here.path).classes)
        text = "a" * 100_000 + "!"
        started = time.monotonic()
        matcher(Facts(TierRequest(Messages([{"role": "user", "content": text}]), GREEDY), 9))
        assert time.monotonic() - started < 5  # a backtracking engine takes centuries
