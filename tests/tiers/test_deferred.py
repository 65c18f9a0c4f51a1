"""Requests that are answered later, by tiers and over HTTP: none is lost, none is answered twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from edge_runtime.deferred import worker
from edge_runtime.deferred.deferrals import Ticket
from edge_runtime.deferred.queue import Queue
from edge_runtime.errors import StorageError
from edge_runtime.prompts import About, Messages, TierRequest
from edge_runtime.server.app import create_app
from tests.server.served import running, wait_until
from tests.tiers.house import GREEDY, LOCAL, QUESTION, House, TieredModel, cloud, house, task
from tests.tiers.upstream import Asked, Connection, answers, delta, says, stalls, status, stream, upstream

LATER = About(fields={"service_tier": "flex"})
ROOT = Path(__file__).parents[2]
AWAY = LOCAL + task(prefer="remote")


def request(text: str = "what is it?", **options: object) -> TierRequest:
    return TierRequest(Messages([{"role": "user", "content": text}]), GREEDY, LATER)


def done(here: House, name: str) -> Ticket:
    """The ticket, once it is over."""
    deferrals = here.dispatcher.deferrals

    def over() -> bool:
        ticket = deferrals.get(name)
        return ticket is None or ticket.state in ("done", "failed")

    wait_until(over)
    ticket = deferrals.get(name)
    assert ticket is not None
    return ticket


# --- answering --------------------------------------------------------------------------------------------------------


def test_an_answer_that_the_disk_has_no_room_for_is_kept_once_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was paid for: it is not asked for again, and the request does not stay for ever as if somebody were at it."""
    monkeypatch.setattr(worker, "LOOK_S", 0.01)
    finish, tried = Queue.finish, []

    def full_at_first(queue: Queue, *given: Any) -> None:
        tried.append(given)
        if len(tried) < 4:
            raise StorageError("database or disk is full")
        finish(queue, *given)

    monkeypatch.setattr(Queue, "finish", full_at_first)
    with upstream(answers("from afar")) as server, house(tmp_path, cloud(server.url) + AWAY) as here:
        ticket = done(here, here.dispatcher.deferrals.add(request()))
        assert ticket.answer is not None
        assert ticket.answer.choices[0].text == "from afar"
        assert len(server.asked) == 1
    assert caplog.text.count("deferred requests wait: database or disk is full") == 1


def test_a_disk_that_is_full_when_it_begins_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LOOK_S", 0.01)
    put_back, tried = Queue.put_back, []

    def full_at_first(queue: Queue) -> None:
        tried.append(queue)
        if len(tried) < 3:
            raise StorageError("database or disk is full")
        put_back(queue)

    monkeypatch.setattr(Queue, "put_back", full_at_first)
    with upstream(answers("from afar")) as server, house(tmp_path, cloud(server.url) + AWAY) as here:
        assert done(here, here.dispatcher.deferrals.add(request())).answer is not None


def test_it_is_answered_by_the_tier_that_should(tmp_path: Path) -> None:
    with upstream(answers("at", " last")) as server, house(tmp_path, cloud(server.url) + AWAY) as here:
        name = here.dispatcher.deferrals.add(request())
        ticket = done(here, name)
        assert ticket.answer is not None
        assert ticket.answer.choices[0].text == "at last"
        assert ticket.answer.tier == "cloud"
        assert server.asked[0].headers["idempotency-key"] == name


def test_by_the_local_model_where_that_comes_first(tmp_path: Path) -> None:
    with house(tmp_path, LOCAL) as here:
        ticket = done(here, here.dispatcher.deferrals.add(request()))
        assert ticket.answer is not None
        assert ticket.answer.choices[0].text == here.local.text()


@pytest.mark.parametrize("fault", [status(503), stalls(), says(stream(delta("half an answer")))])
def test_what_fails_waits_and_is_sent_again_under_the_same_key(
    fault: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "FIRST_WAIT_S", 0.1)
    monkeypatch.setattr(worker, "LOOK_S", 0.1)
    quick = {"first_token": 0.5, "read": 0.5}
    with (
        upstream(fault, answers("whole")) as server,  # type: ignore[arg-type]
        house(tmp_path, cloud(server.url, timeouts=quick) + AWAY) as here,
    ):
        ticket = done(here, here.dispatcher.deferrals.add(request()))
        assert ticket.answer is not None
        assert ticket.answer.choices[0].text == "whole"
        assert not here.local.started  # there is time, so nobody takes the tier's place
        assert len({asked.headers["idempotency-key"] for asked in server.asked}) == 1


def test_offline_it_waits(tmp_path: Path) -> None:
    with upstream(answers("now")) as server:
        policy = cloud(server.url) + AWAY
        with house(tmp_path, policy, offline=True) as here:
            name = here.dispatcher.deferrals.add(request())

            def waits() -> bool:
                ticket = here.dispatcher.deferrals.get(name)
                return ticket is not None and ticket.waits_for is not None

            wait_until(waits)
            ticket = here.dispatcher.deferrals.get(name)
            assert ticket is not None
            assert "offline" in (ticket.waits_for or "")
            assert not server.asked
        with house(tmp_path, policy) as here:  # the next day, with a network
            assert done(here, name).answer is not None
            assert len(server.asked) == 1


def test_a_refusal_is_final(tmp_path: Path) -> None:
    with upstream(status(422)) as server, house(tmp_path, cloud(server.url) + AWAY) as here:
        ticket = done(here, here.dispatcher.deferrals.add(request()))
        assert ticket.failure is not None
        assert "422" in ticket.failure.error
        assert len(server.asked) == 1


def test_many_are_sent_a_few_at_a_time(tmp_path: Path) -> None:
    at_once, most, lock = [0], [0], threading.Lock()

    def slowly(client: Connection) -> None:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.05)
        with lock:
            at_once[0] -= 1
        answers(client.asked.body["messages"][0]["content"])(client)

    with upstream(slowly) as server, house(tmp_path, cloud(server.url) + AWAY) as here:
        names = [here.dispatcher.deferrals.add(request(f"number {number}")) for number in range(12)]
        texts = [ticket.answer.choices[0].text for name in names if (ticket := done(here, name)).answer]
        assert texts == [f"number {number}" for number in range(12)]
        assert 1 < most[0] <= 4
        assert len(server.asked) == 12


def test_kill_9_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    """A process is killed while some of its requests wait and others are being answered; the next one ends them. The
    server counts keys: what it has answered under one key it need not answer again."""
    names: list[str] = []
    first_round = threading.Event()

    def scripted(client: Connection) -> None:
        if not first_round.is_set():
            client.wait_for_the_client_to_leave()
        else:
            answers(client.asked.body["messages"][0]["content"])(client)

    with upstream(scripted) as server:
        policy = cloud(server.url) + AWAY
        code = f"""
        import sys, time
        from pathlib import Path
        from tests.tiers.house import house
        from tests.tiers.test_deferred import request
        with house(Path({str(tmp_path)!r}), {policy!r}) as here:
            for number in range(8):
                print(here.dispatcher.deferrals.add(request(f"number {{number}}")), flush=True)
            time.sleep(60)
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert child.stdout is not None
            names = [child.stdout.readline().strip() for _ in range(8)]
            wait_until(lambda: len(server.asked) >= 4)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
        first_round.set()
        with house(tmp_path, policy) as here:
            texts = [ticket.answer.choices[0].text for name in names if (ticket := done(here, name)).answer]
            assert texts == [f"number {number}" for number in range(8)]
            here.dispatcher.close()
            assert here.ledger  # verified when it is read
    by_key: dict[str, list[Asked]] = {}
    for asked in server.asked:
        by_key.setdefault(asked.headers["idempotency-key"], []).append(asked)
    assert set(by_key) == set(names)
    for several in by_key.values():
        assert len({asked.raw.partition(b"\r\n\r\n")[2] for asked in several}) == 1  # the same request, to the byte
        assert len(several) <= 2


# --- over HTTP --------------------------------------------------------------------------------------------------------


def test_openai_s_client_defers_looks_and_fetches(tmp_path: Path) -> None:
    gate = threading.Event()

    def later(client: Connection) -> None:
        gate.wait(20)
        answers("it", " is done")(client)

    with (
        upstream(later) as server,
        house(tmp_path, cloud(server.url) + AWAY) as here,
        running(create_app(TieredModel(here))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        ticket = client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "later, please"}],
            service_tier="flex",
        )
        assert ticket.choices == []
        waiting = client.chat.completions.retrieve(ticket.id)
        assert waiting.choices == []
        assert waiting.model_extra["edge_glm"]["status"] in ("queued", "running")  # type: ignore[index]
        gate.set()
        done(here, ticket.id)
        answer = client.chat.completions.retrieve(ticket.id)
        assert answer.choices[0].message.content == "it is done"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
        raw = httpx.get(f"{url}/v1/chat/completions/{ticket.id}")
        assert raw.headers["x-edge-glm-tier"] == "cloud"
        assert client.chat.completions.delete(ticket.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.retrieve(ticket.id)


def test_a_class_may_defer_and_says_202_with_a_place(tmp_path: Path) -> None:
    chat = {"model": "fake", "messages": [*QUESTION]}
    policy = LOCAL + task(mode="deferred", privacy="local-only")
    with house(tmp_path, policy) as here, running(create_app(TieredModel(here))) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=chat)
        assert response.status_code == 202
        place = response.headers["location"]
        done(here, response.json()["id"])
        body = httpx.get(f"{url}{place}").json()
        assert body["choices"][0]["message"]["content"]
        refused = httpx.post(f"{url}/v1/chat/completions", json=chat | {"stream": True})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "stream"


def test_a_full_queue_is_503_with_retry_after(tmp_path: Path) -> None:
    chat = {"model": "fake", "messages": [*QUESTION], "service_tier": "flex"}
    with (
        house(tmp_path, "[deferred]\nmax_count = 0\n" + LOCAL) as here,
        running(create_app(TieredModel(here))) as url,
    ):
        response = httpx.post(f"{url}/v1/chat/completions", json=chat)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "60"


def test_a_failure_is_told_with_its_status(tmp_path: Path) -> None:
    chat = {"model": "fake", "messages": [*QUESTION], "service_tier": "flex"}
    with (
        upstream(status(422)) as server,
        house(tmp_path, cloud(server.url) + AWAY) as here,
        running(create_app(TieredModel(here))) as url,
    ):
        name = httpx.post(f"{url}/v1/chat/completions", json=chat).json()["id"]
        done(here, name)
        response = httpx.get(f"{url}/v1/chat/completions/{name}")
        assert response.status_code == 400
        assert "422" in response.json()["error"]["message"]


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from edge_runtime.cli.main import main

    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    assert main(["deferred"]) == 0
    assert "no request waits" in capsys.readouterr().out
    with house(tmp_path, LOCAL) as here:
        name = here.dispatcher.deferrals.add(request())
        text = here.local.text()
        done(here, name)
    assert main(["deferred"]) == 0
    assert name in capsys.readouterr().out
    assert main(["deferred", name]) == 0
    assert capsys.readouterr().out.strip() == text.strip()
    assert main(["deferred", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "done"
    assert main(["deferred", name, "--remove"]) == 0
    assert main(["deferred", name]) == 1
    assert "there is no deferred request" in capsys.readouterr().err
