"""``edge-glm tune``, as a user meets it, and what ``auto`` learns from it."""

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

import msgspec
import pytest

from edge_runtime import EdgeLLM
from edge_runtime.bench import process
from edge_runtime.bench.job import Job
from edge_runtime.cli.main import main
from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.machine import fingerprint
from edge_runtime.measurements import Shape
from edge_runtime.paths import home
from edge_runtime.placement import Wish, place
from edge_runtime.store import Store
from edge_runtime.timing.observations import Observations, Subject, TimedRun
from edge_runtime.tuning import run as run_module
from edge_runtime.tuning.records import Options, Run, Setup, Verdict
from edge_runtime.tuning.run import tune
from edge_runtime.tuning.table import conclusion, table
from tests.benchmarking.results import make_result
from tests.conftest import usable
from tests.timing.known import CHUNK, observed
from tests.tuning.machine import DEFAULT, new_run

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-P", "-m", "edge_runtime.cli.main"]
SMALL = ["synthetic:tiny", "--prompt-tokens", "40", "--new-tokens", "20"]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_GLM_")}
    return {**kept, "EDGE_GLM_HOME": str(folder), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def command(tmp_path: Path) -> Command:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [*COMMAND, *arguments]
        return subprocess.run(
            words, env=environment(tmp_path), cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=250
        )

    return run


# --- from the command to the log --------------------------------------------------------------------------------------


def test_a_few_seconds(command: Command, tmp_path: Path) -> None:
    began = time.monotonic()
    done = command("tune", *SMALL, "--device", "onnxruntime:cpu", "--time-limit", "20", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert time.monotonic() - began < 20 + 120
    run = json.loads(done.stdout)
    (kept,) = json.loads((tmp_path / "cache" / "tuning.json").read_bytes())["runs"]
    assert kept == run
    first = run["trials"][0]
    assert (first["lever"], first["setup"]) == ("default", {"device": "onnxruntime:cpu", "options": {}})
    assert first["figures"]["seconds"] > 0
    assert first["figures"]["nll"] > 0
    assert run["best"] is None or run["best"]["device"] == "onnxruntime:cpu"
    assert run["machine"] == fingerprint()
    assert run["versions"]["onnxruntime"]
    assert run["shape"] == {"prompt_tokens": 40, "new_tokens": 20, "concurrency": 1}
    assert max(trial["at_s"] for trial in run["trials"]) < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "'no-such-model' names no model"),
        (["synthetic:tiny", "--device", "tpu"], "unknown device 'tpu'"),
        (["synthetic:tiny", "--time-limit", "0"], "--time-limit must be a number of seconds above 0, not 0"),
        (["synthetic:tiny", "--time-limit", "inf"], "not inf"),
        (["synthetic:tiny", "--time-limit", "nan"], "not nan"),
        (["synthetic:tiny", "--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["synthetic:tiny", "--workload", "long"], "make 2080 tokens; the context of this model and device has 1024"),
        (["synthetic:tiny", "--memory-budget", "1MiB"], "more than the budget of 1.0 MiB"),
    ],
)
def test_refusals_are_one_line(command: Command, arguments: list[str], message: str) -> None:
    done = command("tune", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("edge-glm: ")
    assert message in line


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_keeps_what_was_tried(tmp_path: Path) -> None:
    words = [*COMMAND, "tune", *SMALL, "--device", "onnxruntime:cpu"]
    running = subprocess.Popen(words, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = tmp_path / "cache" / "tuning.json"
    deadline = time.monotonic() + 120
    while not log.exists():
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    output, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert output == b""
    (run,) = json.loads(log.read_bytes())["runs"]
    assert run["trials"]
    assert run["best"] is None
    assert f"stopped; {len(run['trials'])} trials are kept in {log}" in errors.decode()


def test_a_measurement_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    job = Job(ref="synthetic:tiny", prompt_tokens=8, new_tokens=500, repeats=100_000, nll=False)
    process.prepare(job)
    began = time.monotonic()
    with pytest.raises(EdgeError, match="it took more than the 3 s that it was given"):
        process.measure(job, 3)
    assert time.monotonic() - began < 30


# --- on a machine of which the times are known ------------------------------------------------------------------------


class Bench:
    """Stands in for the measuring processes: request seconds by device and threads."""

    def __init__(self, seconds: Callable[[Job], float]) -> None:
        self._seconds = seconds
        self.jobs: list[Job] = []

    def prepare(self, job: Job) -> None:
        for engine in ("onnxruntime", "openvino", "onnxruntime-edge"):
            Store(home()).ensure("synthetic:tiny", engine, "int4")

    def measure(self, job: Job, limit_s: float | None = None) -> Any:
        self.jobs.append(job)
        seconds = self._seconds(job)
        return make_result(
            device=job.device,
            prompt_tokens=job.prompt_tokens,
            new_tokens=job.new_tokens,
            concurrency=job.concurrency,
            prefill_tps=2 * job.prompt_tokens / seconds,
            decode_tps=2 * job.new_tokens / seconds,
            nll=3.0 if job.nll else None,
            timed=timed_run(job.device) if job.timing else None,
        )


def timed_run(device: str) -> TimedRun:
    return TimedRun(subject=Subject("0", device, "", "here"), chunk=CHUNK, created="now", observations=observed())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Job], float]], Bench]:
    """On a machine that has all three engines."""
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("devices.edge_kernels.instructions", lambda: "avx2")

    def make(seconds: Callable[[Job], float]) -> Bench:
        made = Bench(seconds)
        monkeypatch.setattr(run_module, "process", made)
        return made

    return make


def faster_on_openvino(job: Job) -> float:
    assert job.tuning is not None
    speed = {"edge:cpu": 1.0, "onnxruntime:cpu": 0.5, "openvino:cpu": 1.5}[job.device]
    return 1 / (speed * (2 if job.tuning.threads == 1 else 1))


def test_auto_learns_of_a_better_device(bench: Callable[..., Bench]) -> None:
    made = bench(faster_on_openvino)
    run = tune(Job(ref="synthetic:tiny"))
    assert run.default == Setup("edge:cpu")
    assert run.best == Setup("openvino:cpu", Options(threads=1))
    assert run.gain == pytest.approx(3.0)
    assert all(job.tuning is not None and job.weights == "int4" and job.repeats == 1 for job in made.jobs)
    (job,) = [job for job in made.jobs if job.timing]
    assert made.jobs[-1] is job
    assert (job.device, job.tuning) == ("openvino:cpu", Options(threads=1))
    assert Observations(home().timing).of(timed_run("openvino:cpu").subject) == [timed_run("openvino:cpu")]
    placed = place(Store(home()), Wish("synthetic:tiny", "auto"))
    assert placed.device.name == "openvino:cpu"
    assert placed.reason == "the fastest here of 3 measured with one stream"
    assert place(Store(home()), Wish("synthetic:tiny", "auto", workload="many")).device.name == "edge:cpu"
    again = tune(Job(ref="synthetic:tiny"))
    assert again.default == Setup("openvino:cpu")
    assert again.trials[2].setup == run.best  # what was found comes first
    assert again.best == run.best
    assert again.gain == pytest.approx(2.0)


def test_what_was_found_stays_when_single_requests_cannot_be_timed(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = bench(faster_on_openvino)
    plain = made.measure

    def measure(job: Job, limit_s: float | None = None) -> Any:
        return msgspec.structs.replace(plain(job, limit_s), timed=None, untimed="no room" if job.timing else None)

    monkeypatch.setattr(made, "measure", measure)
    assert tune(Job(ref="synthetic:tiny")).best == Setup("openvino:cpu", Options(threads=1))
    assert "how long single requests take is not known: no room" in caplog.text


def test_auto_learns_nothing_where_the_default_stays(bench: Callable[..., Bench]) -> None:
    bench(lambda job: 1.0)
    run = tune(Job(ref="synthetic:tiny"), "many")
    assert run.best == run.default == Setup("edge:cpu")
    assert not home().measurements.exists()


def test_one_device_if_it_is_named(bench: Callable[..., Bench]) -> None:
    made = bench(faster_on_openvino)
    run = tune(Job(ref="synthetic:tiny", device="onnxruntime:cpu", memory_budget="1GiB"))
    assert run.best == Setup("onnxruntime:cpu", Options(threads=1))
    assert {job.device for job in made.jobs} == {"onnxruntime:cpu"}
    assert {job.memory_budget for job in made.jobs} == {"1GiB"}


def test_a_log_that_cannot_be_written_does_not_end_it(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    bench(lambda job: 1.0)
    home().tuning.mkdir(parents=True)
    assert tune(Job(ref="synthetic:tiny", device="onnxruntime:cpu")).best == Setup("onnxruntime:cpu")
    assert caplog.text.count("what was tried is not kept") == 1


def test_an_interruption_keeps_the_trials(bench: Callable[..., Bench]) -> None:
    def seconds(job: Job) -> float:
        if len(made.jobs) == 4:
            raise KeyboardInterrupt
        return 1.0

    made = bench(seconds)
    seen: list[Run] = []
    with pytest.raises(KeyboardInterrupt):
        tune(Job(ref="synthetic:tiny"), prepared=seen.append)
    assert len(seen[0].trials) == 3
    (kept,) = json.loads(home().tuning.read_bytes())["runs"]
    assert len(kept["trials"]) == 3


def test_on_the_command_line(bench: Callable[..., Bench], capsys: pytest.CaptureFixture[str]) -> None:
    usable("edge:cpu")
    made = bench(lambda job: 0.5 if job.tuning == Options(kv_type="int8") else 1.0)
    words = ["tune", "synthetic:tiny", "--device", "edge:cpu", "--workload", "many", "--prompt-tokens", "99"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("synthetic:tiny int4, 99 prompt tokens, 64 new, 8 at once; trials: ")
    assert lines[-1] == "nothing is faster than the default beyond the noise: edge:cpu stays"
    assert {(job.prompt_tokens, job.concurrency) for job in made.jobs} == {(99, 8)}
    assert main([*words, "--allow-int8-kv"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "used from now on: edge:cpu, KV cache int8: 2.00 times the default (edge:cpu)"
    assert {job.tuning.kv_type for job in made.jobs if job.tuning is not None} == {None, "int8"}
    with EdgeLLM("synthetic:tiny", "edge:cpu", workload="many") as llm:
        assert llm.reason.endswith(": KV cache int8: 2.00 times the default")


@pytest.mark.parametrize("limit_s", [0, -1, float("nan"), float("inf")])
def test_no_time_limit_at_all(limit_s: float) -> None:
    with pytest.raises(ConfigError, match="--time-limit must be a number of seconds above 0"):
        tune(Job(ref="synthetic:tiny"), limit_s=limit_s)


# --- in words ---------------------------------------------------------------------------------------------------------


def test_the_table_tells_each_lever() -> None:
    best = Setup("edge:cpu", Options(threads=2, prefill_chunk=128))
    run = new_run(best=best, candidate=best, gain=1.5, shape=Shape(512, 64, 8))
    run.verdicts += [
        Verdict("device", Setup("openvino:cpu"), DEFAULT, "failed", why="no such luck"),
        Verdict("threads", Setup("edge:cpu", Options(threads=2)), DEFAULT, "won", (1.25,) * 3, 1.2, 1.3),
        Verdict("chunk", best, Setup("edge:cpu", Options(threads=2)), "lost", (0.8,)),
    ]
    lines = [" ".join(line.split()) for line in table(run).splitlines()]
    assert lines[0] == "m int4, 512 prompt tokens, 64 new, 8 at once; trials: 0"
    assert "device edge:cpu openvino:cpu failed" in lines
    assert "threads default threads 2 1.25 (1.20 to 1.30) *" in lines
    assert "chunk default chunk 128 0.80 no gain" in lines
    assert "device, openvino:cpu: no such luck" in lines
    assert lines[-1] == "used from now on: edge:cpu, threads 2, chunk 128: 1.50 times the default (edge:cpu)"


def test_a_busy_machine_is_told() -> None:
    words = "busy with other work (load average 900)"
    assert words in table(new_run(best=DEFAULT, load_average=900.0))
    for quiet in (0.1, None):
        assert "busy" not in table(new_run(best=DEFAULT, load_average=quiet))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"best": DEFAULT}, "nothing is faster than the default beyond the noise: edge:cpu stays"),
        ({}, "nothing was decided; what was found before stays"),
        ({"candidate": Setup("openvino:cpu")}, "no time was left to confirm openvino:cpu, so it is not used; tune "),
    ],
)
def test_conclusions(changes: dict[str, object], words: str) -> None:
    assert conclusion(new_run(**changes)).startswith(words)


def test_what_was_not_tried_for_want_of_time_is_told() -> None:
    run = new_run(best=DEFAULT, limit_s=60.0, verdicts=[Verdict("threads", DEFAULT, DEFAULT, "no time")])
    assert conclusion(run).endswith("; not tried to the end for want of time: 1 (--time-limit 120 gives more)")
