"""``edge-glm bench``, as a user meets it: in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edge_runtime.bench import local, process
from edge_runtime.bench.job import Job
from edge_runtime.bench.machine import peak_rss_bytes, this_machine
from edge_runtime.bench.measure import measure
from edge_runtime.bench.table import remarks
from edge_runtime.bench.workload import bundled_text
from edge_runtime.cli.main import main
from edge_runtime.engine import Engine
from edge_runtime.errors import BudgetError, ConfigError, EdgeError
from edge_runtime.llm import EdgeLLM
from edge_runtime.prompts import TierRequest, TokenIds
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.app import create_app
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import LetterTokenizer
from tests.server.served import FakeModel, running

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-P", "-m", "edge_runtime.cli.main", "bench"]
# answers so long that on a busy machine, too, readers see them grow
SMALL = ["synthetic:tiny", "--prompt-tokens", "48", "--new-tokens", "200", "--repeats", "2", "--no-timing"]
SHAPE: dict[str, Any] = {"prompt_tokens": 40, "new_tokens": 10, "concurrency": 3, "repeats": 2}
Bench = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty: the bench has to export what it measures first."""
    return tmp_path_factory.mktemp("home")


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_GLM_")}
    return {**kept, "EDGE_GLM_HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def bench(home: Path, tmp_path: Path) -> Bench:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            env=environment(home),
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=200,
        )

    return run


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("device", ["onnxruntime:cpu", "openvino:cpu"])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_json(bench: Bench, device: str, concurrency: int) -> None:
    arguments = [*SMALL, "--json", "--device", device, "--concurrency", str(concurrency)]
    result = json.loads(succeeds(bench(*arguments)))
    for name in ("prefill_tps", "decode_tps", "load_s", "start_s", "peak_rss_bytes", "nll", "nll_tokens"):
        assert result[name] > 0, name
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        assert 0 < result[name]["p50"] <= result[name]["p95"] <= result[name]["p99"], name
    assert result["start_s"] > result["load_s"]
    assert (result["model"], result["device"], result["weights"]) == ("synthetic:tiny", device, "int4")
    assert (result["prompt_tokens"], result["new_tokens"], result["concurrency"]) == (48, 200, concurrency)
    assert result["requests"] == len(result["samples"]["ttft_ms"]) == 2 * concurrency
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert 0 < result["shares"]["inference"] < 1
    assert 0 < result["shares"]["device"] < 1
    assert result["errors"] is result["rate"] is result["shared_prefix"] is None
    assert {"edge-glm", "onnxruntime", "openvino", "numpy"} <= set(result["machine"]["versions"])


def test_table_files_and_comparison(bench: Bench, tmp_path: Path) -> None:
    device = ["--device", "onnxruntime:cpu"]  # auto goes by what the tests before measured
    files = ["--output", "a.json", "--html", "a.html"]
    text = succeeds(bench(*SMALL, *device, "--no-nll", "--copy", "--shared-prefix", "300", *files))
    assert text.startswith("synthetic:tiny int4 on ")
    assert "time to first token" in text
    assert "times as fast when 300 of 300 shared tokens are known" in text
    assert "loss" not in text
    assert "copying, with prompt lookup" in text
    assert "of 3 answers the same" in text
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["nll"] is None
    assert result["shared_prefix"]["warm_ttft_ms"] > 0
    assert result["copying"]["tasks"] == 3
    assert result["copying"]["plain_tps"] > 0
    assert 0 <= result["copying"]["accepted"] <= 1
    assert "<svg" in (tmp_path / "a.html").read_text(encoding="utf-8")
    compared = succeeds(bench(*SMALL, "--compare", "a.json"))
    assert "compared with a.json" in compared
    assert "prefill" in compared[compared.index("compared with") :]


def test_a_server(bench: Bench) -> None:
    model = FakeModel("served")
    with running(create_app(model)) as url:
        arguments = ["--url", url, "--prompt-tokens", "90", "--new-tokens", "8", "--requests", "4"]
        result = json.loads(succeeds(bench(*arguments, "--json", "--chat", "--concurrency", "2")))
        assert (result["model"], result["requests"], result["errors"]) == ("served", 4, {})
        text = succeeds(bench(*arguments, "--rate", "50", "--goodput", "ttft:9999"))
        assert "Poisson arrivals at 50 a second" in text
    model.engine.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "'no-such-model' names no model"),
        (["no/such/model.gguf"], "no/such/model.gguf"),
        (["synthetic:tiny", "--device", "tpu"], "unknown device 'tpu'"),
        (["synthetic:tiny", "--prompt-tokens", "0"], "--prompt-tokens must be at least 1, not 0"),
        (["synthetic:tiny", "--new-tokens", "0"], "--new-tokens must be at least 2"),
        (["synthetic:tiny", "--concurrency", "0"], "--concurrency must be at least 1, not 0"),
        (["synthetic:tiny", "--repeats", "0"], "--repeats must be at least 1, not 0"),
        (
            ["synthetic:tiny", "--prompt-tokens", "1000"],
            "--prompt-tokens 1000 and --new-tokens 64 make 1064 tokens",
        ),
        (["synthetic:tiny", "--prompt-tokens", "1000"], "has 1024"),
        (["synthetic:tiny", "--concurrency", "9"], "9 streams of 576 tokens"),
        (["synthetic:tiny", "--compare", "absent.json"], "cannot compare with absent.json: No such file"),
        (["synthetic:tiny", "--output", "absent/a.json"], "cannot write absent/a.json: there is no folder"),
        (["synthetic:tiny", "--rate", "2"], "--rate needs --url"),
        (["synthetic:tiny", "--model", "x"], "--model needs --url"),
        (["synthetic:tiny", "--chat"], "--chat needs --url"),
        ([], "bench needs a model reference"),
        (["--url", "http://127.0.0.1:1", "--no-nll"], "--no-nll is for a model in this process"),
        (["--url", "http://127.0.0.1:1", "--threads", "2"], "--threads is for a model in this process"),
        (["--url", "http://127.0.0.1:1"], "is the server running?"),
        (["x", "--url", "http://127.0.0.1:1"], "named by --model, not 'x'"),
        (["--url", "http://127.0.0.1:1", "--goodput", "e2e:5"], "--goodput takes limits"),
    ],
)
def test_refusals_are_one_line(bench: Bench, arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("edge-glm: ")
    assert message in line


# --- the measuring process --------------------------------------------------------------------------------------------


def test_what_lies_in_the_current_folder_is_not_run(bench: Bench, tmp_path: Path) -> None:
    for name in ("devices", "edge_runtime", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('from the current folder')")
    done = bench("synthetic:tiny", "--prompt-tokens", "8", "--new-tokens", "8", "--repeats", "1", "--no-nll")
    assert done.returncode == 0, done.stderr


def start_measuring(home: Path) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """A long measurement and its worker, once that has been at work for a while."""
    arguments = [*COMMAND, "synthetic:tiny", "--new-tokens", "500", "--repeats", "1000"]
    parent = subprocess.Popen(arguments, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for child in psutil.Process(parent.pid).children():
            if child.cpu_times().user > 3:  # the one that prepares is done before
                return parent, child
        time.sleep(0.05)
    parent.kill()
    raise AssertionError("no worker came to work")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_measuring_process_ends_with_the_command(home: Path, how: signal.Signals) -> None:
    parent, worker = start_measuring(home)
    parent.send_signal(how)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == (130 if how == signal.SIGINT else -how)
    assert errors == b""
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running()


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_measuring_process_that_dies(home: Path) -> None:
    parent, worker = start_measuring(home)
    worker.kill()
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == 1
    assert errors.decode() == "edge-glm: the measuring process was ended by signal 9; is there enough memory?\n"


def test_single_requests_are_timed_for_plan(
    bench: Bench, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["synthetic:tiny", "--device", "onnxruntime:cpu", "--repeats", "1", "--no-nll", "--prompt-tokens", "64"]
    timed = json.loads(succeeds(bench(*small, "--json")))["timed"]
    assert timed["subject"]["device"] == "onnxruntime:cpu"
    assert {each["type"] for each in timed["observations"]} == {"first", "each"}
    assert all(each["seconds"] > 0 for each in timed["observations"])
    *_, kept = json.loads((home / "cache" / "timing.json").read_bytes())["runs"]
    assert kept == timed
    monkeypatch.setenv("EDGE_GLM_HOME", str(home))
    assert main(["plan", "synthetic:tiny", "--device", "onnxruntime:cpu", "--prompt", "300", "--json"]) == 0
    (candidate,) = json.loads(capsys.readouterr().out)["candidates"]
    assert 0 < candidate["timing"]["tpot_s"]["seconds"] < candidate["timing"]["ttft_s"]["seconds"] < 10
    with EdgeLLM("synthetic:tiny", "onnxruntime:cpu") as llm:
        request = TierRequest(TokenIds([5] * 200), SamplingParams(max_tokens=5))
        assert llm.local.predicted_ttft(request) is not None


def test_a_measuring_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(EdgeError, match="the measuring process ended with exit code 3"):
        process.run(Job(ref="synthetic:tiny"))


@pytest.mark.skipif(sys.platform == "win32", reason="not told there")
def test_peak_memory_is_that_of_the_process_alone() -> None:
    """Linux's getrusage would say what the parent once had."""
    ballast = np.ones(64 << 20)  # 512 MiB
    code = "from edge_runtime.bench.machine import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    mine = peak_rss_bytes()
    assert mine is not None
    assert mine > ballast.nbytes
    assert 1 << 20 < int(done.stdout) < 300 << 20


def test_machine() -> None:
    machine = this_machine()
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.memory_bytes == psutil.virtual_memory().total


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(home: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_GLM_HOME", str(home))
        with local.open_model(Job(ref="synthetic:tiny", **SHAPE), prefix_cache=False) as llm:
            yield llm


def test_rounds(llm: local.MeasuredLLM) -> None:
    before = llm.stats
    rounds = local.speed(llm, Job(ref="synthetic:tiny", **SHAPE))
    assert [len(streams) for streams in rounds] == [3, 3]
    assert {stream.times.tokens for streams in rounds for stream in streams} == {10}
    # nothing came from a cache, and one round warmed up
    assert llm.stats.prompt_tokens - before.prompt_tokens == 3 * 3 * 40
    for streams in rounds:
        for stream in streams:
            assert stream.cached_tokens == 0
            assert [tokens for _, tokens in stream.times.arrivals] == [1] * 10  # each seen as it came
            assert stream.times.submitted < stream.times.first < stream.times.last
            assert 0 < stream.at_first.inference_seconds <= stream.at_last.inference_seconds
            assert 0 < stream.at_first.forward_seconds <= stream.at_last.forward_seconds
    # at rest: a reader may look while a step has told the one clock and not yet the other; since before: a decoder
    # that was warmed up, or that scored a text, has run outside the engine's steps
    after = llm.stats
    forward = after.forward_seconds - before.forward_seconds
    assert 0 < after.inference_seconds - before.inference_seconds < forward


def test_what_was_measured_is_not_lost_when_single_requests_cannot_be_timed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(home))
    opened = local.open_model

    def open_model(job: Job, *, prefix_cache: bool, **options: Any) -> local.MeasuredLLM:
        if prefix_cache:
            raise BudgetError("others have taken the memory meanwhile")
        return opened(job, prefix_cache=prefix_cache, **options)

    monkeypatch.setattr(local, "open_model", open_model)
    result = measure(Job(ref="synthetic:tiny", timing=True, nll=False, **SHAPE | {"concurrency": 1}), time.time())
    assert result.decode_tps is not None
    assert result.timed is None
    assert remarks(result)["single requests"] == "not timed: others have taken the memory meanwhile"


def test_loss_is_the_mean_over_what_fits(llm: local.MeasuredLLM) -> None:
    nll, tokens = local.loss(llm)
    ids = llm.tokenizer.encode(bundled_text())
    assert tokens == min(len(ids), 1024) - 1
    assert nll == pytest.approx(-llm.score(ids[:1024]).mean(), rel=1e-5)


def test_a_prefix_that_is_not_kept_is_refused(llm: local.MeasuredLLM) -> None:
    with pytest.raises(ConfigError, match=r"--shared-prefix 100 is too long to be kept: .* 1024 tokens together"):
        local.shared_prefix(llm, Job(ref="synthetic:tiny"), 100)  # this model was opened without a prefix cache


def test_engine_counts_the_decoders_time() -> None:
    decoder = FakeDecoder(before_forward=lambda batch: time.sleep(0.002))
    with Engine(decoder, LetterTokenizer(), vocab_size=decoder.vocab_size) as engine:
        assert engine.stats.forward_seconds == 0
        decoder.engine_seconds = 0.5
        for _ in engine.submit([1, 2, 3], SamplingParams(temperature=0, max_tokens=20)):
            pass
        assert len(decoder.batches) == 20
        assert engine.stats.forward_seconds >= 20 * 0.002
        assert engine.stats.inference_seconds == 0.5
