"""EdgeLLM with a policy, on a real engine: Python, the command line, and another edge-glm as a tier."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import EdgeLLM, SamplingParams
from edge_runtime.cli.main import main
from edge_runtime.errors import ConfigError, InvalidRequest, PolicyError
from edge_runtime.server.app import create_app
from tests.server.served import running, wait_until
from tests.tiers.house import LOCAL, cloud, task
from tests.tiers.upstream import answers, upstream

GREEDY = SamplingParams(temperature=0, max_tokens=6)
TINY = "synthetic:tiny"
OPTIONS = {"weights": "fp32", "threads": 1, "device": "onnxruntime:cpu"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_GLM_HOME", str(folder))
        with EdgeLLM(TINY, **OPTIONS):  # type: ignore[arg-type]
            pass
        yield folder


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return tmp_path / "policy.toml"


def opened(policy: Path, text: str, **more: object) -> EdgeLLM:
    policy.write_text(text, encoding="utf-8")
    return EdgeLLM(TINY, policy=policy, **OPTIONS, **more)  # type: ignore[arg-type]


def test_the_python_object_says_who_answered_and_why(home: Path, policy: Path) -> None:
    with upstream(answers("from ", "afar")) as server:
        text = cloud(server.url) + LOCAL + task(name="away", match={"keywords": ["far"]}, prefer="remote") + task()
        with opened(policy, text) as llm:
            away = llm.generate("is it far?", GREEDY)
            assert (away.text, away.tier, away.route.task_class) == ("from afar", "cloud", "away")
            assert away.usage.completion_tokens == 3
            near = llm.generate("is it near?", GREEDY)
            assert (near.tier, near.route.task_class) == ("local", "all")
            assert near.route.headers()["x-edge-glm-tier"] == "local"
            chunks = llm.stream("is it far?", GREEDY)
            assert "".join(chunk.text for chunk in chunks) == "from afar"
            assert chunks.route.tier == "cloud"
            alone = llm.generate(llm.tokenizer.encode("far"), GREEDY)
            assert alone.tier == "local"  # token ids mean something here only


def test_the_same_answer_with_and_without_a_policy(home: Path, policy: Path) -> None:
    with EdgeLLM(TINY, **OPTIONS) as plain:  # type: ignore[arg-type]
        expected = plain.generate("hello there", GREEDY)
        assert expected.route.tier == "local"
        assert expected.route.reason == "there is no other tier"
    with opened(policy, LOCAL + cloud("http://localhost:9/v1") + task()) as llm:
        routed = llm.generate("hello there", GREEDY)
        assert (routed.text, routed.token_ids) == (expected.text, expected.token_ids)
        assert routed.usage.prompt_tokens == expected.usage.prompt_tokens
        assert routed.finish_reason == expected.finish_reason


def test_another_edge_glm_is_a_tier(home: Path, policy: Path) -> None:
    sampling = SamplingParams(temperature=0.7, top_k=5, min_p=0.1, repetition_penalty=1.1, seed=3, max_tokens=8)
    with EdgeLLM(TINY, **OPTIONS) as far, running(create_app(far)) as url:  # type: ignore[arg-type]
        expected = far.generate("hello there", sampling)
        tier = cloud(f"{url}/v1").replace('"openai"', '"edge-glm"').replace('"big"', f'"{far.model_id}"')
        with opened(policy, tier + LOCAL + task(prefer="remote")) as llm:
            answer = llm.generate("hello there", sampling)
            assert answer.tier == "cloud"
            assert answer.text == expected.text
            assert answer.usage == expected.usage


def test_a_second_model_is_a_tier_of_its_own(home: Path, policy: Path) -> None:
    second = f'[[tiers]]\nname = "second"\nkind = "local"\nmodel = "{TINY}"\ndevice = "onnxruntime:cpu"\n'
    with opened(policy, LOCAL + second + task(tiers=["second"], privacy="local-only")) as llm:
        answer = llm.generate("hello", GREEDY)
        assert answer.tier == "second"


def test_later_from_python(home: Path, policy: Path) -> None:
    with opened(policy, LOCAL) as llm:
        name = llm.defer("hello there", GREEDY)

        def over() -> bool:
            ticket = llm.deferred(name)
            return ticket is not None and ticket.state == "done"

        wait_until(over)
        ticket = llm.deferred(name)
        assert ticket is not None
        assert ticket.answer is not None
        assert ticket.answer.choices[0].text == llm.generate("hello there", GREEDY).text
        assert llm.deferred("nothing") is None
        with pytest.raises(InvalidRequest, match="only chats"):
            llm.defer([1, 2, 3])
    assert (home / "deferred.sqlite").stat().st_mode & 0o077 == 0
    assert (home / "ledger.sqlite").stat().st_mode & 0o077 == 0
    with EdgeLLM(TINY, **OPTIONS) as plain, pytest.raises(ConfigError, match="there is no policy"):  # type: ignore[arg-type]
        plain.defer("hello")


def test_a_policy_that_cannot_be_used_leaves_nothing_open(home: Path, policy: Path) -> None:
    before = threading.active_count()
    with pytest.raises(PolicyError, match="there is no tier cloudy"):
        opened(policy, LOCAL + task(tiers=["cloudy"]))
    with pytest.raises(PolicyError, match="tier second"):
        opened(policy, LOCAL + '[[tiers]]\nname = "second"\nkind = "local"\nmodel = "no/such/model.gguf"\n')
    with pytest.raises(PolicyError, match="cannot read"):
        EdgeLLM(TINY, policy=policy.with_name("nothing.toml"), **OPTIONS)  # type: ignore[arg-type]
    assert threading.active_count() == before


# --- the command line -------------------------------------------------------------------------------------------------


def test_run_says_who_answered(home: Path, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [TINY, "hello", "--device", "onnxruntime:cpu", "--max-tokens", "4", "--policy", str(policy)]
    with upstream(answers("from afar")) as server:
        policy.write_text(cloud(server.url) + LOCAL + task(prefer="remote"))
        assert main(["run", *common]) == 0
        out, err = capsys.readouterr()
        assert out == "from afar\n"
        assert "edge-glm: cloud answered: first choice of class all" in err
        assert main(["run", *common, "--offline"]) == 0
        assert "local answered in place of another: cloud: offline mode is on" in capsys.readouterr().err
        policy.write_text(LOCAL)
        assert main(["run", *common]) == 0
        assert "answered" not in capsys.readouterr().err


def test_route_explains(home: Path, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text(LOCAL + cloud("http://localhost:9/v1") + task(name="chat", match={"header": {"x-a": "b"}}))
    common = ["--model", TINY, "--device", "onnxruntime:cpu", "--policy", str(policy)]
    assert main(["route", "What is 17 + 25?", *common, "--header", "X-A=b", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["class"] == "chat"
    assert shown["order"] == ["local", "cloud"]
    assert shown["judged"] is True
    assert shown["signals"]["operators"] > 0
    assert set(shown["tiers"]) == {"local", "cloud"}
    assert main(["route", "What is 17 + 25?", *common, "--answer", "--max-tokens", "4"]) == 0
    text = capsys.readouterr().out
    assert "unmatched (no class of the policy takes it)" in text
    assert "answered by local" in text
    assert "privacy of class unmatched is local-only" in text


def test_route_checks(home: Path, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text(LOCAL + cloud("http://localhost:9/v1") + task())
    assert main(["route", "--check", str(policy)]) == 0
    assert "2 tiers, 1 classes" in capsys.readouterr().out
    policy.write_text(LOCAL + task(tiers=["x"]) + task(name="b", tiers=["y"]))
    assert main(["route", "--check", "--policy", str(policy)]) == 1
    told = capsys.readouterr().err
    assert "there is no tier x" in told
    assert "there is no tier y" in told
    for wrong in (["route"], ["route", "a", "b"], ["route", "--check"], ["route", "hello"]):
        assert main(wrong) == 1
        assert capsys.readouterr().err.startswith("edge-glm: ")
    policy.write_text(LOCAL)
    assert main(["route", "hello", "--policy", str(policy), "--model", TINY, "--header", "nonsense"]) == 1
    assert "'nonsense' is not NAME=VALUE" in capsys.readouterr().err


def test_route_calibrates(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out, page = tmp_path / "tasks.jsonl", tmp_path / "c.json", tmp_path / "c.html"
    assert main(["route", "tasks", "-o", str(data), "--count", "20"]) == 0
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(rows) == 40
    for number, row in enumerate(rows):  # a model of random weights answers nothing right
        row |= {"answer": None, "local_good": float(number % 3 == 0), "max_tokens": 4}
    data.write_text("\n".join(map(json.dumps, rows)))
    common = ["--model", TINY, "--device", "onnxruntime:cpu", "-o", str(out), "--html", str(page)]
    assert main(["route", "calibrate", str(data), *common, "--quality", "0.9"]) == 0
    told = capsys.readouterr().out
    assert "AUROC" in told
    assert "ROC, bad answers kept" in told
    assert "remote share  quality" in told
    assert page.read_text().count("<svg") == 4
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[routing]\ncalibration = "{out}"\n' + LOCAL + cloud("http://localhost:9/v1") + task())
    with EdgeLLM(TINY, policy=policy, **OPTIONS) as llm:  # type: ignore[arg-type]
        assert llm.generate("hello", GREEDY).route.good is not None
