"""All devices side by side, and what ``auto`` makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_runtime.bench.every import every_table, measure, measurement, shapes
from edge_runtime.bench.job import Job
from edge_runtime.bench.machine import this_machine
from edge_runtime.bench.measure import now
from edge_runtime.bench.result import Percentiles, Result, Samples
from edge_runtime.errors import ConfigError, EdgeError

ROOT = Path(__file__).parents[2]
NONE = Percentiles(0, 0, 0)
JOB = Job(ref="m")


def result(job: Job, prefill: float, decode: float) -> Result:
    return Result(
        created=now(),
        model="m",
        device=job.device,
        weights="int4",
        prompt_tokens=job.prompt_tokens,
        new_tokens=job.new_tokens,
        concurrency=job.concurrency,
        requests=5,
        seed=0,
        prefill_tps=prefill,
        decode_tps=decode,
        ttft_ms=NONE,
        tpot_ms=NONE,
        itl_ms=NONE,
        samples=Samples([], [], []),
        machine=this_machine(),
    )


def run(job: Job) -> Result:
    if job.device == "openvino:cpu":
        raise EdgeError("no such luck")
    return result(job, 1000, {"edge:cpu": 100, "onnxruntime:cpu": 50 if job.concurrency == 1 else 400}[job.device])


def test_workloads_are_what_they_are_called() -> None:
    for job in (JOB, Job(ref="m", prompt_tokens=16), Job(ref="m", prompt_tokens=4000, new_tokens=10, concurrency=20)):
        assert {workload: shape.workload for workload, shape in shapes(job).items()} == {
            "one": "one",
            "many": "many",
            "long": "long",
        }


def test_seconds_of_a_request() -> None:
    found = measurement(result(Job(ref="m", device="edge:cpu"), 1024, 128), "here")
    assert (found.seconds, found.device, found.machine) == (1.0, "edge:cpu", "here")


def test_devices_take_turns_and_what_fails_is_told() -> None:
    kept: list[Result] = []
    order: list[str] = []

    def noted(job: Job) -> Result:
        order.append(job.device)
        return run(job)

    found = measure(JOB, ["edge:cpu", "onnxruntime:cpu", "openvino:cpu"], noted, kept.append)
    assert order == ["edge:cpu", "onnxruntime:cpu", "openvino:cpu"] * 3
    assert [each.device for each in kept] == ["edge:cpu", "onnxruntime:cpu"] * 3
    lines = every_table(JOB, found, kept=True).splitlines()
    edge, onnxruntime = (next(line for line in lines if line.startswith(name)) for name in ("edge", "onnxruntime"))
    assert "1.15 s (1,000, 100)*" in edge
    assert [cell.strip().endswith("*") for cell in edge.split("  ") if "s (" in cell] == [True, False, True]
    assert [cell.strip().endswith("*") for cell in onnxruntime.split("  ") if "s (" in cell] == [False, True, False]
    assert [line for line in lines if "no such luck" in line] == [
        f"openvino:cpu, {workload}: no such luck" for workload in ("one", "many", "long")
    ]


def test_what_could_not_be_timed_is_told() -> None:
    def untimed(job: Job) -> Result:
        return msgspec.structs.replace(run(job), untimed="no room" if job.timing else None)

    found = measure(msgspec.structs.replace(JOB, timing=True), ["edge:cpu"], untimed, lambda _: None)
    assert every_table(JOB, found, kept=True).endswith("\nedge:cpu, single requests were not timed: no room")


def test_what_auto_does_not_go_by_is_not_said_to_be(tmp_path: Path) -> None:
    found = measure(JOB, ["edge:cpu"], run, lambda _: None)
    assert every_table(JOB, found, kept=True).endswith("* is what auto takes for such work from now on")
    assert every_table(JOB, found, kept=False).endswith("* is the fastest")
    for given in (["--threads", "1"], ["--kv-type", "float32"]):
        device = ["--device", "onnxruntime:cpu", "--prompt-tokens", "20", "--new-tokens", "20"]
        done = command(tmp_path, "synthetic:tiny", "--no-timing", *given, *device)
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "cache" / "measurements.json").exists()


def test_no_device_at_all() -> None:
    with pytest.raises(ConfigError, match="no device could be measured: openvino:cpu: no such luck"):
        measure(JOB, ["openvino:cpu"], run, lambda _: None)


@pytest.mark.parametrize("flag", [["--device", "cpu"], ["--copy"], ["--output", "x.json"], ["--url", "http://h"]])
def test_what_is_of_one_device_is_refused(flag: list[str], tmp_path: Path) -> None:
    done = command(tmp_path, "synthetic:tiny", "--every-device", *flag)
    assert done.returncode == 1
    assert "leave it out with --every-device" in done.stderr


def test_auto_goes_by_what_was_measured(tmp_path: Path) -> None:
    """From the command to the choice, with a model so small that any device may win."""
    small = ["synthetic:tiny", "--prompt-tokens", "20", "--new-tokens", "20", "--repeats", "1", "--no-timing"]
    done = command(tmp_path, *small, "--every-device", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= 2
    file = tmp_path / "cache" / "measurements.json"
    kept = json.loads(file.read_bytes())
    assert {each["device"] for each in kept} == set(found)
    for winner in found:
        for each in kept:
            each["seconds"] = 1 if each["device"] == winner else 2
        file.write_bytes(msgspec.json.encode(kept))
        code = "import sys; from edge_runtime import EdgeLLM; print(EdgeLLM(sys.argv[1], workload=sys.argv[2]).device)"
        for workload in ("one", "many", "long"):
            arguments = [sys.executable, "-c", code, "synthetic:tiny", workload]
            opened = subprocess.run(arguments, env=environment(tmp_path), capture_output=True, text=True, timeout=200)
            assert opened.stdout.strip() == winner, opened.stderr


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_GLM_")}
    return {**kept, "EDGE_GLM_HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


def command(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "edge_runtime.cli.main", "bench", *arguments]
    return subprocess.run(words, env=environment(home), capture_output=True, encoding="utf-8", timeout=250)
