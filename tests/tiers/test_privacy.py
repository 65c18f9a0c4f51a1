"""What is local-only never leaves, whatever fails: listened to on the wire, and in the source."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.errors import EdgeError, EngineError, Overloaded, PromptTooLong
from edge_runtime.prompts import About
from tests.tiers.house import LOCAL, cloud, house, task
from tests.tiers.upstream import answers, status, upstream

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "edge_runtime/bench/client.py",  # measures a server that the user names
    "edge_runtime/cli/remote.py",  # asks the user's own server what it has open
    "edge_runtime/egress/door.py",
    "edge_runtime/fetch.py",  # gets models, sends nothing of anybody's
    "edge_runtime/server/run.py",  # listens
    "edge_runtime/server/supervisor.py",  # tells this machine's service manager that all is well
    "edge_runtime/tiers/remote.py",  # reads what the door has opened
    "edge_runtime/tiers/network.py",  # asks the system for its interfaces
}
NETWORK = ("httpx", "httpx2", "socket", "http", "urllib.request", "requests", "aiohttp", "huggingface_hub", "ssl")


def sources() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted((ROOT / "edge_runtime").rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_only_a_few_modules_know_the_network() -> None:
    met = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if any(module == each or module.startswith(f"{each}.") for each in NETWORK)
    }
    assert met == ELSEWHERE


def test_one_function_sends() -> None:
    """Nothing but the door makes a client or sends with one."""
    calls = {
        (name, ast.unparse(node.func))
        for name, tree in sources()
        if name.startswith(
            ("edge_runtime/egress", "edge_runtime/tiers", "edge_runtime/routing", "edge_runtime/deferred")
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr in ("build_request", "AsyncClient", "Client", "create_connection", "open_connection"))
    }
    assert calls == {
        ("edge_runtime/egress/door.py", "httpx2.AsyncClient"),
        ("edge_runtime/egress/door.py", "self._client(spec).build_request"),
    }


@pytest.mark.parametrize("error", [None, PromptTooLong("too long"), Overloaded("full"), EngineError("gone")])
@pytest.mark.parametrize("options", [{}, {"prefer": "remote"}, {"hedge_ms": 0}, {"broken_stream": "continue"}])
def test_local_only_stays_here_whatever_fails(
    error: EdgeError | None, options: dict[str, object], tmp_path: Path
) -> None:
    with upstream(answers("leaked")) as server:
        policy = cloud(server.url) + LOCAL + task(privacy="local-only", **options)
        with house(tmp_path, policy) as here:
            here.local.error = error
            if error is None:
                assert here.ask().tiers == ["local"]
            else:
                with pytest.raises(type(error)):
                    here.ask()
            with pytest.raises(EdgeError):
                here.ask(about=About(extras={"tools": [{}]}))
            with pytest.raises(PromptTooLong):
                here.ask([{"role": "user", "content": "x" * 3000}])
            here.dispatcher.close()
            assert here.ledger == []
        assert not server.asked


def test_local_only_on_the_wire(tmp_path: Path) -> None:
    """In a process of its own that reports every connection and every name it looks up, with a policy whose other class
    does go out, so that the report is known to work."""
    with upstream(answers("from afar")) as server:
        policy = cloud(server.url) + LOCAL
        policy += task(name="secret", privacy="local-only", match={"keywords": ["secret"]}, prefer="remote")
        policy += task(name="open", prefer="remote")
        code = f"""
        import sys
        from pathlib import Path
        seen = []
        def hear(event, arguments):
            if event.startswith("socket.") and event.split(".")[1] in (
                "connect", "sendto", "sendmsg", "getaddrinfo", "gethostbyname"
            ):
                seen.append(event)
        sys.addaudithook(hear)
        from tests.tiers.house import house
        with house(Path({str(tmp_path)!r}), {policy!r}) as here:
            for _ in range(3):
                assert here.ask([{{"role": "user", "content": "my secret"}}]).tiers == ["local"]
            here.ask([{{"role": "user", "content": "my secret"}}])
            assert seen == [], seen
            assert here.ask([{{"role": "user", "content": "hello"}}]).tiers == ["cloud"]
            assert "socket.connect" in seen
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert len(server.asked) == 1
        assert b"secret" not in server.asked[0].raw


def test_a_key_is_in_the_header_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-very-secret-key")
    caplog.set_level("DEBUG")
    with (
        upstream(answers("hi"), status(401, {"error": {"message": "no such key: sk-very-secret-key"}})) as server,
        house(
            tmp_path,
            "[privacy]\nledger_content = true\n"
            + cloud(server.url, api_key_env="SOME_KEY")
            + LOCAL
            + task(prefer="remote"),
        ) as here,
    ):
        answer = here.ask()
        assert server.asked[0].headers["authorization"] == "Bearer sk-very-secret-key"
        second = here.ask()
        assert "no such key: [the key]" in (second.route.degraded or "")
        here.dispatcher.close()
        told = [
            str(second.route),
            caplog.text,
            str(here.ledger),
            str(answer.route),
            str(here.dispatcher.health()),
            repr(vars(here)),
        ]
        assert not any("very-secret" in each for each in told)
        for file in tmp_path.iterdir():
            assert b"very-secret" not in file.read_bytes()


def test_no_socket_is_open_without_a_remote_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("a connection")

    with house(tmp_path, LOCAL) as here:
        monkeypatch.setattr(socket.socket, "connect", refuse)
        assert here.ask().tiers == ["local"]


@pytest.mark.parametrize("device", ["edge:cpu", "onnxruntime:cpu", "openvino:cpu"])
def test_engines_keep_nothing_of_their_own(device: str, tmp_path: Path) -> None:
    """ONNX Runtime 1.32 would write a machine's id and a database of events into the home, to be sent to its maker."""
    user = tmp_path / "user"
    user.mkdir()
    kept = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "ORT_DISABLE_TELEMETRY")
    environment = {name: value for name, value in os.environ.items() if name not in kept}
    code = f"from edge_runtime import EdgeLLM\nwith EdgeLLM('synthetic:tiny', {device!r}) as llm: llm.generate('Hi')"
    subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HOME": str(user), "EDGE_GLM_HOME": str(tmp_path / "ours"), "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=120,
    )
    assert [path.relative_to(user).as_posix() for path in user.rglob("*")] == []
