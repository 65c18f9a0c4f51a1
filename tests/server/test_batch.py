"""Batches: in order, gone on with after a kill, what fails in its line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.batch.files import Answers, check_requests
from edge_runtime.batch.run import answer_batch
from edge_runtime.errors import ConfigError, EngineStopped, StorageError
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.app import create_app
from tests.server.served import FakeModel

ROOT = Path(__file__).parents[2]


def chat(number: int, **more: Any) -> dict[str, Any]:
    body = {"model": "fake", "messages": [{"role": "user", "content": f"Number {number}"}], "temperature": 0}
    return {
        "custom_id": f"r{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body | {"max_tokens": 5 + number % 17} | more,
    }


def write(file: Path, lines: list[Any]) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def answer(app: Any, requests: Path, target: Path) -> int:
    answers = Answers(target, requests)
    try:
        return asyncio.run(answer_batch(app, requests, answers, {"fake": "fake"}, 8, lambda done: None))
    finally:
        answers.close()


def test_every_answer_in_its_place(tmp_path: Path) -> None:
    lines: list[Any] = [chat(number) for number in range(60)]
    text = {"model": "fake", "prompt": "Hi", "max_tokens": 3, "temperature": 0}
    lines[7] = {"custom_id": "text", "url": "/v1/completions", "body": text}
    lines[20] = chat(20, temperature=9)
    lines[33] = {"custom_id": "response", "url": "/v1/responses", "body": {"model": "fake", "input": "Hi"}}
    lines.insert(5, "")
    requests = write(tmp_path / "in.jsonl", lines)
    model = FakeModel()
    assert answer(create_app(model), requests, tmp_path / "out.jsonl") == 1
    answers = read(tmp_path / "out.jsonl")
    assert [each["custom_id"] for each in answers] == [line["custom_id"] for line in lines if line]
    for line, found in zip((line for line in lines if line), answers, strict=True):
        response = found["response"]
        if found["custom_id"] == "r20":
            assert response["status_code"] == 400
            assert response["body"]["error"]["param"] == "temperature"
        else:
            assert response["status_code"] == 200
        if found["custom_id"] in ("r0", "r16"):
            params = SamplingParams(temperature=0, max_tokens=line["body"]["max_tokens"])
            expected, _ = model.answer(line["body"]["messages"], params)
            assert response["body"]["choices"][0]["message"]["content"] == expected
    model.engine.close()


def test_it_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    requests = write(tmp_path / "in.jsonl", [chat(number) for number in range(30)])
    model = FakeModel()
    app = create_app(model)
    answer(app, requests, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for kept, cut in ((11, b'{"id": "x", "custom_'), (0, b""), (30, b"")):
        (tmp_path / "out.jsonl").write_bytes(b"".join(whole[:kept]) + cut)
        assert answer(app, requests, tmp_path / "out.jsonl") == 0
        found = read(tmp_path / "out.jsonl")
        assert [each["custom_id"] for each in found] == [f"r{number}" for number in range(30)]
        assert (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)[:kept] == whole[:kept]
        for one, other in zip(found, read(tmp_path / "whole.jsonl"), strict=True):
            assert one["response"]["body"]["choices"] == other["response"]["body"]["choices"]
    (tmp_path / "out.jsonl").write_bytes(whole[1])
    with pytest.raises(ConfigError, match="holds other answers"):
        Answers(tmp_path / "out.jsonl", requests)
    model.engine.close()


def test_a_full_disk_ends_it_with_the_answer_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = write(tmp_path / "in.jsonl", [chat(number) for number in range(3)])
    answers = Answers(tmp_path / "out.jsonl", requests)
    answers.write({"custom_id": "r0"})
    before = (tmp_path / "out.jsonl").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"out.jsonl: No space left on device; free some space"):
            answers.write({"custom_id": "r1"})
    assert (tmp_path / "out.jsonl").read_bytes() == before
    answers.write({"custom_id": "r1"})
    answers.close()
    assert [each["custom_id"] for each in read(tmp_path / "out.jsonl")] == ["r0", "r1"]


def test_a_model_that_dies_takes_nothing_of_the_batch_with_it(tmp_path: Path) -> None:
    model = FakeModel()
    requests = write(tmp_path / "in.jsonl", [chat(number) for number in range(9)])
    target = tmp_path / "out.jsonl"
    model.engine.close()
    with pytest.raises(EngineStopped):
        answer(create_app(model), requests, target)
    assert answer(create_app(FakeModel()), requests, target) == 0
    assert [each["custom_id"] for each in read(target)] == [f"r{number}" for number in range(9)]


def test_no_room_for_a_while(tmp_path: Path) -> None:
    """A queue of one, eight at once: those that find it full ask again."""
    requests = write(tmp_path / "in.jsonl", [chat(number) for number in range(10)])
    model = FakeModel(max_queue=1)
    assert answer(create_app(model), requests, tmp_path / "out.jsonl") == 0
    assert len(read(tmp_path / "out.jsonl")) == 10
    model.engine.close()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "has no requests"),
        (["{"], "line 1"),
        ([chat(0), "[]"], "line 2"),
        ([chat(0), chat(0)], "two requests have the custom_id 'r0'"),
        ([chat(0) | {"url": "/v1/files"}], "is not one of POST"),
        ([chat(0) | {"method": "GET"}], "is not one of POST"),
        ([chat(0) | {"mood": "good"}], "unknown field mood"),
        ([{"custom_id": "x"}], "missing required field url"),
        ([chat(0, model=3)], "names no model"),
        ([chat(0, stream=True)], "do not stream"),
    ],
)
def test_files_that_are_no_batches(tmp_path: Path, lines: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_requests(write(tmp_path / "in.jsonl", lines))


def test_files_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        check_requests(tmp_path / "none.jsonl")
    requests = write(tmp_path / "in.jsonl", [chat(0)])
    with pytest.raises(StorageError, match="cannot write"):
        Answers(tmp_path / "no" / "out.jsonl", requests)


def test_the_command_survives_a_kill(tmp_path: Path) -> None:
    lines = [chat(number, model="synthetic:tiny", max_tokens=300, ignore_eos=True) for number in range(60)]
    write(tmp_path / "in.jsonl", lines)
    environment = {**os.environ, "EDGE_GLM_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}

    def command(target: str, *words: str) -> list[str]:
        main = [sys.executable, "-P", "-m", "edge_runtime.cli.main", "batch", "in.jsonl", target]
        return [*main, "--device", "edge:cpu", *words]

    whole = subprocess.run(command("whole.jsonl"), cwd=tmp_path, env=environment, capture_output=True, timeout=200)
    assert whole.returncode == 0, whole.stderr
    with subprocess.Popen(command("out.jsonl"), cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as killed:
        deadline = time.monotonic() + 100
        out = tmp_path / "out.jsonl"
        while not out.exists() or out.read_bytes().count(b"\n") < 5:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
    before = out.read_bytes().count(b"\n")
    done = subprocess.run(command("out.jsonl"), cwd=tmp_path, env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert 5 <= before <= 60
    texts = [
        [each["response"]["body"]["choices"] for each in read(tmp_path / name)] for name in ("out.jsonl", "whole.jsonl")
    ]
    assert texts[0] == texts[1]
    again = subprocess.run(command("out.jsonl"), cwd=tmp_path, env=environment, capture_output=True, timeout=200)
    assert b"all 60 are answered already" in again.stderr
    other = subprocess.run(
        command("in.jsonl"), cwd=tmp_path, env=environment, capture_output=True, timeout=200, encoding="utf-8"
    )
    assert "a file of their own" in other.stderr
