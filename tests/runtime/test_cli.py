"""The command line, as a user meets it: in processes of its own."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from edge_runtime.cli.main import main
from edge_runtime.cli.run import _chat
from edge_runtime.errors import ConfigError, CorruptModel
from edge_runtime.llm import EdgeLLM
from edge_runtime.request import Chunk
from edge_runtime.route import only_local
from edge_runtime.sampling import SamplingParams
from edge_runtime.settings import load_settings

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "edge_runtime.cli.main"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds synthetic:tiny for both engines."""
    folder = tmp_path_factory.mktemp("home")
    command = [*COMMAND, "pull", "synthetic:tiny", "--engine", "all"]
    subprocess.run(command, env=environment(folder), cwd=folder, check=True, capture_output=True)
    return folder


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_GLM_")}
    return {**kept, "EDGE_GLM_HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


@pytest.fixture
def edge(home: Path, tmp_path: Path) -> Run:
    def run(*arguments: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            env={**environment(home), **more},
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )

    return run


def fails(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line on stderr."""
    assert done.returncode == code
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("edge-glm: ")
    return line


def test_another_device_is_never_silent(edge: Run) -> None:
    line = fails(edge("run", "synthetic:tiny", "hello", "--device", "npu"))
    assert "openvino finds no NPU here" in line
    done = edge("run", "synthetic:tiny", "hello", "--device", "npu", "--fallback", "--max-tokens", "2")
    assert done.returncode == 0
    (told,) = done.stderr.splitlines()
    assert told.startswith("edge-glm: on ")
    assert "the best that can be used; not openvino:npu: " in told


def test_help_and_version(edge: Run) -> None:
    shown = edge("--help")
    assert shown.returncode == 0
    for command in ("pull", "export", "run", "serve", "list", "show", "rm", "devices", "bench", "tune"):
        assert command in shown.stdout
    assert edge("--version").stdout.startswith("edge-glm ")


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["run"], ["run", "x", "--max-tokens", "many"], ["export", "x"]])
def test_usage(edge: Run, arguments: list[str]) -> None:
    done = edge(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: edge-glm")


@pytest.mark.parametrize("device", ["openvino:cpu", "onnxruntime:cpu"])
def test_run_end_to_end(edge: Run, device: str) -> None:
    options = ["--device", device, "--max-tokens", "5", "--temperature", "0"]
    first = edge("run", "synthetic:tiny", "hi", *options)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert first.stdout.endswith("\n")
    assert len(first.stdout) > 1
    assert edge("run", "synthetic:tiny", *options, stdin="hi").stdout == first.stdout
    assert edge("run", "synthetic:tiny", "-", *options, stdin="hi").stdout == first.stdout
    assert edge("run", "synthetic:tiny", "hi", *options, "--system", "Be brief.").returncode == 0


def test_a_prompt_may_follow_flags(edge: Run) -> None:
    flags = ["--temperature", "0", "--max-tokens", "4"]
    orders = (
        ["synthetic:tiny", "hello", *flags],
        ["synthetic:tiny", *flags, "hello"],
        [*flags, "synthetic:tiny", "hello"],
    )
    first, *others = [edge("run", *order) for order in orders]
    assert first.returncode == 0
    assert first.stdout.strip()
    assert [each.stdout for each in others] == [first.stdout] * 2


def test_seed(edge: Run) -> None:
    options = ["run", "synthetic:tiny", "hi", "--max-tokens", "12", "--temperature", "2"]
    answers = [edge(*options, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "llama", "hi"], "known forms: smollm2:135m"),
        (["run", "synthetic:tiny", "hi", "--device", "tpu"], "unknown device 'tpu'; known: auto, cpu"),
        (["run", "synthetic:tiny", "hi", "--device", "npu"], "finds no NPU"),
        (["run", "synthetic:tiny", " "], "the prompt is empty"),
        (["run", "synthetic:tiny", "hi", "--temperature", "-1"], "temperature"),
        (["run", "synthetic:tiny", "hi", "--max-tokens", "5000"], "max_tokens asks for 5000 more"),
        (["run", "synthetic:tiny", "hi", "--memory-budget", "1MiB"], "no variant of synthetic:tiny fits"),
        (["show", "synthetic:absent"], "not on this machine"),
        (["rm", "synthetic:absent"], "not on this machine"),
        (["export", "synthetic:absent", "-o", "x"], "there are: "),
        (["serve", "synthetic:tiny", "--host", "0.0.0.0"], "API key"),
    ],
)
def test_errors_are_one_line(edge: Run, arguments: list[str], message: str) -> None:
    assert message in fails(edge(*arguments))


def test_errors_do_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They quote files and servers."""

    def fail(arguments: object) -> int:
        raise CorruptModel("the tensor \x1b[2J\u202egone\x07 is\nmissing")

    monkeypatch.setattr("edge_runtime.cli.models.list_models", fail)
    assert main(["list"]) == 1
    assert capsys.readouterr().err == "edge-glm: the tensor \ufffd[2J\ufffdgone\ufffd is missing\n"


def test_verbose_shows_the_traceback(edge: Run) -> None:
    for arguments in (["--verbose", "show", "synthetic:absent"], ["show", "synthetic:absent", "--verbose"]):
        done = edge(*arguments)
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert "ModelNotFound" in done.stderr


def test_models_come_and_go(home: Path, edge: Run, tmp_path: Path) -> None:
    here = {"EDGE_GLM_HOME": str(tmp_path / "other")}
    assert edge("list", **here).stdout == ""
    assert json.loads(edge("list", "--json", **here).stdout) == []
    pulled = edge("pull", "synthetic:tiny", "--engine", "onnx", "--weights", "int8", **here)
    assert pulled.stdout.startswith("synthetic:tiny: onnx-int8 in ")
    assert pulled.stdout.splitlines()[1] == "licence: CC0-1.0"
    assert edge("list", **here).stdout.split()[0] == "synthetic:tiny"
    (row,) = json.loads(edge("list", "--json", **here).stdout)
    assert row["variants"] == ["onnx-int8"]
    shown = edge("show", "synthetic:tiny", "--verify", **here).stdout
    assert "onnx-int8" in shown
    assert "verified" in shown
    assert json.loads(edge("show", "synthetic:tiny", "--json", **here).stdout)["schema_version"] == 1
    weights = Path(row["folder"]) / "onnx-int8" / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    assert "SHA-256" in fails(edge("show", "synthetic:tiny", "--verify", **here))
    assert "SHA-256" in fails(edge("run", "synthetic:tiny", "hi", "--weights", "int8", **here))
    assert edge("rm", "synthetic:tiny", **here).stdout.startswith("removed ")
    assert edge("list", **here).stdout == ""


def test_export(edge: Run, tmp_path: Path) -> None:
    options = ["export", "synthetic:tiny", "-o", "made", "--weights", "int8"]
    assert "onnx-int8" in edge(*options, "--engine", "onnx").stdout
    assert "made: onnx-int8, openvino-int8, onnx-edge-int8 in" in edge(*options, "--engine", "all").stdout
    assert edge("run", "made", "hi", "--max-tokens", "3").returncode == 0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    assert "not a model package" in fails(edge("export", "synthetic:tiny", "-o", "thesis"))


def test_devices(edge: Run) -> None:
    rows = {row["name"]: row for row in json.loads(edge("devices", "--json").stdout)}
    assert rows["openvino:cpu"]["ready"]
    assert rows["onnxruntime:cpu"]["ready"]
    assert rows["onnxruntime:coreml"]["problem"]
    assert rows["edge:cpu"]["ready"] or rows["edge:cpu"]["problem"]
    assert "openvino:cpu" in edge("devices").stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes that break")
def test_a_reader_that_leaves(home: Path) -> None:
    command = [*COMMAND, "run", "synthetic:tiny", "hi", "--temperature", "0"]
    process = subprocess.Popen(command, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_chat(home: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    # the likeliest token ends no answer here, so each goes on to the end of the context
    process = subprocess.Popen(
        [*COMMAND, "run", "synthetic:tiny", "--temperature", "0"],
        env={**environment(home), "TERM": "dumb"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    screen = b""

    def read_until(mark: bytes) -> bytes:
        nonlocal screen
        deadline = time.monotonic() + 60
        seen = b""
        while mark not in seen:
            ready, _, _ = select.select([leader], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, screen + seen
            seen += os.read(leader, 4096)
        screen += seen
        return seen

    try:
        read_until(b">>> ")
        os.write(leader, b"hi\n")
        read_until(b"hi\r\n")
        read_until(b"\xef")  # the answer, mostly U+FFFD, has begun
        process.send_signal(signal.SIGINT)
        assert b"Ctrl-C again" not in read_until(b">>> ")  # it met the answer, not the prompt
        time.sleep(0.5)  # the prompt shows a moment before input() waits; a signal in between is seen at the next key
        process.send_signal(signal.SIGINT)
        assert b"Ctrl-C again" in read_until(b">>> ")
        os.write(leader, b"hello\n")  # which is forgiven by going on
        read_until(b">>> ")
        os.write(leader, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def test_chat_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[list[str]] = []

    class Yes:
        route = only_local()

        def __iter__(self) -> Iterator[Chunk]:
            return iter([Chunk("yes")])

        def close(self) -> None: ...

    def stream(messages: list[dict[str, str]], params: SamplingParams) -> Yes:
        asked.append([message["content"] for message in messages])
        return Yes()

    llm = SimpleNamespace(model_id="m", device="d", reason="it was asked for", stream=stream)
    lines = iter(["a", " ", "b", "/help", "/clear", "c", "/bye", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert _chat(cast(EdgeLLM, llm), "be brief", SamplingParams()) == 0
    assert asked == [["be brief", "a"], ["be brief", "a", "yes", "b"], ["be brief", "c"]]
    assert "/clear forgets the conversation" in capsys.readouterr().err
    assert next(lines) == "never read"


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_interrupted_answer(home: Path) -> None:
    command = [*COMMAND, "run", "synthetic:tiny", "hi", "--temperature", "0"]
    process = subprocess.Popen(command, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_serve(home: Path) -> None:
    command = [*COMMAND, "serve", "--port", "0", "--api-key", "secret"]  # the only model here
    process = subprocess.Popen(command, env=environment(home), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = ""
        while "serving on" not in line:
            line = process.stderr.readline()
            assert line, "the server ended"
        url = next(word for word in line.split() if word.startswith("http://"))
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": "Bearer secret"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["synthetic:tiny"]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


# --- settings ---------------------------------------------------------------------------------------------------------


def test_flags_beat_variables_beat_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("edge-glm.toml").write_text('device = "cpu"\nport = 1\nhost = "::1"\n')
    variables = {"EDGE_GLM_PORT": "2", "EDGE_GLM_DEVICE": "openvino:cpu", "EDGE_GLM_HOME": str(tmp_path)}
    settings = load_settings({"device": "onnxruntime:cpu", "port": None}, variables)
    assert (settings.device, settings.port, settings.host) == ("onnxruntime:cpu", 2, "::1")
    assert settings.temperature is None


@pytest.mark.parametrize(
    ("text", "variables", "message"),
    [
        ("devise = 1", {}, r"edge-glm\.toml: .*devise.*known settings: .*device"),
        ('port = "80"', {}, r"edge-glm\.toml: .*int.*port"),
        ("port = ", {}, r"cannot read .*edge-glm\.toml"),
        ("", {"EDGE_GLM_PORT": "http"}, "environment: .*port"),
        ("", {"EDGE_GLM_DEVISE": "cpu"}, "environment: .*devise"),
        ("", {"EDGE_GLM_WEIGHTS": "int3"}, "environment: .*int3"),
    ],
)
def test_settings_are_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, variables: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("edge-glm.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings({}, variables)


def test_named_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.toml").write_text("threads = 3")
    assert load_settings({}, {"EDGE_GLM_CONFIG": "other.toml"}).threads == 3
    with pytest.raises(ConfigError, match=r"cannot read absent\.toml"):
        load_settings({}, {"EDGE_GLM_CONFIG": "absent.toml"})


def test_settings_reach_the_commands(edge: Run, tmp_path: Path) -> None:
    assert "unknown device 'tpu'" in fails(edge("run", "synthetic:tiny", "hi", EDGE_GLM_DEVICE="tpu"))
    flags = ("--device", "onnxruntime:cpu", "--kv-type", "int8")
    assert "keeps keys and values as float32, not int8" in fails(edge("run", "synthetic:tiny", *flags, "hi"))
    (tmp_path / "edge-glm.toml").write_text("max_tokens = 5000")
    assert "asks for 5000 more" in fails(edge("run", "synthetic:tiny", "hi"))
