"""Where settings come from, and that ``config show`` tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_runtime.cli.main import main
from edge_runtime.errors import ConfigError
from edge_runtime.settings import load_settings, origins


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    return tmp_path


def test_flags_beat_variables_beat_the_file(home: Path) -> None:
    (home / "home" / "edge-glm.toml").write_text('port = 1\nhost = "0.0.0.0"\nthreads = 3\n')
    environ = {"EDGE_GLM_HOME": str(home / "home"), "EDGE_GLM_PORT": "2", "EDGE_GLM_OFFLINE": "true"}
    settings = load_settings({"port": 3, "device": None}, environ)
    assert (settings.port, settings.host, settings.threads, settings.offline) == (3, "0.0.0.0", 3, True)
    assert load_settings({}, environ).port == 2
    found = origins(environ)
    assert (found["port"].value, found["port"].source) == (2, "EDGE_GLM_PORT")
    assert (found["host"].value, found["host"].source) == ("0.0.0.0", str(home / "home" / "edge-glm.toml"))
    assert (found["device"].value, found["device"].source) == ("auto", "default")


def test_the_file_here_goes_before_the_users_and_a_named_one_before_both(home: Path) -> None:
    (home / "home" / "edge-glm.toml").write_text("port = 1\n")
    environ = {"EDGE_GLM_HOME": str(home / "home")}
    assert load_settings({}, environ).port == 1
    (home / "edge-glm.toml").write_text("port = 2\n")
    assert load_settings({}, environ).port == 2
    (home / "mine.toml").write_text("port = 3\n")
    assert load_settings({}, environ | {"EDGE_GLM_CONFIG": str(home / "mine.toml")}).port == 3
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_settings({}, environ | {"EDGE_GLM_CONFIG": str(home / "none.toml")})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = 'x'", "port"),
        ("mood = 1", "mood"),
        ("port = [", "edge-glm.toml"),
        ("threads = 1.5", "threads"),
        ("port = " + "9" * 5000, "digits"),
        ("cors = " + "[" * 10_000 + "]" * 10_000, "recursion"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(home: Path, text: str, words: str) -> None:
    (home / "edge-glm.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"edge-glm\.toml") as wrong:
        load_settings({}, {})
    assert words in str(wrong.value)


def test_origins_of_pages() -> None:
    for given in ("https://a.example, https://b.example", ["https://a.example", "https://b.example"]):
        assert load_settings({"cors": given}, {}).origins == ["https://a.example", "https://b.example"]
    assert load_settings({}, {}).origins == []


def test_config_show(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "edge-glm.toml").write_text('device = "cpu"\n')
    monkeypatch.setenv("EDGE_GLM_API_KEY", "s3cret")
    assert main(["config", "show"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["device"] == ["cpu", "edge-glm.toml"]
    assert rows["api_key"] == ["(secret)", "EDGE_GLM_API_KEY"]
    assert rows["port"] == ["8000", "default"]
    assert "s3cret" not in text
    assert main(["config", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["device"] == {"value": "cpu", "source": "edge-glm.toml"}
    assert told["settings"]["api_key"]["value"] == "(secret)"
    assert str(home / "edge-glm.toml") in told["files"]
    monkeypatch.setenv("EDGE_GLM_MOOD", "good")
    assert main(["config"]) == 1
    assert "mood" in capsys.readouterr().err
