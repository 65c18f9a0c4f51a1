"""The page in a real browser, without a network beyond the server's own."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from edge_runtime.server.app import create_app
from edge_runtime.server.shelf import Offer, Shelf
from tests.browser import PICTURES, picture, visiting
from tests.server.served import FakeModel, running


class Served:
    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.model = FakeModel(max_context=2048, before_forward=lambda batch: self.gate.wait(30) and None)


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.gate.set()
    made.model.engine.close()


def ask(page: Page, text: str) -> None:
    """Once there is a model to ask: the page fetches their names when it is open already."""
    expect(page.get_by_label("Model")).not_to_have_value("")
    page.get_by_label("Question").fill(text)
    page.keyboard.press("Enter")


def longest(page: Page, tokens: int) -> None:
    page.get_by_text("Options").click()
    page.get_by_label("Longest answer").fill(str(tokens))
    page.get_by_label("Temperature").fill("0")


def refused(status: str) -> str:
    """What the console says of it."""
    return f"Failed to load resource: the server responded with a status of {status}"


def answers(page: Page, count: int) -> list[str]:
    """Once there are so many."""
    found = page.locator(".assistant .said")
    expect(found).to_have_count(count)
    return found.all_inner_texts()


def test_a_conversation(browser: Browser, served: Served) -> None:
    with running(create_app(served.model)) as url, visiting(browser, url) as page:
        expect(page.get_by_label("Model")).to_have_value("fake")
        expect(page.locator("#device")).to_have_text("on fake:cpu")
        longest(page, 12)
        ask(page, "Hi")
        about = page.locator(".assistant .about")
        expect(about).to_contain_text("by local")
        expect(about).to_contain_text("12 tokens")
        messages = [{"role": "user", "content": "Hi"}]
        body = {"model": "fake", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
        first = httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert answers(page, 1) == [first]

        ask(page, "And?")
        expect(page.locator(".assistant .about")).to_have_count(2)
        expect(page.locator(".assistant .about").nth(1)).to_contain_text("tokens")
        second = answers(page, 2)[1]
        with page.expect_request_finished(lambda request: request.url.endswith("/v1/chat/completions")):
            page.locator(".assistant").nth(1).get_by_role("button", name="Try again").click()
        expect(page.locator(".assistant .about").nth(1)).to_contain_text("tokens")
        assert answers(page, 2) == [first, second]

        page.reload()  # it stays in this browser
        assert answers(page, 2) == [first, second]
        page.locator(".user").nth(1).get_by_role("button", name="Edit").click()
        expect(page.get_by_label("Question")).to_have_value("And?")
        assert answers(page, 1) == [first]
        if PICTURES:
            longest(page, 40)
            ask(page, "And what else, if this question is rather long and has to be broken into lines?")
            expect(page.locator(".assistant .about")).to_have_count(2)
            picture(page, "chat")
        page.get_by_role("button", name="New chat").click()
        assert answers(page, 0) == []


def test_who_is_quick_is_answered_once_the_models_are_known(browser: Browser, served: Served) -> None:
    with running(create_app(served.model)) as url, visiting(browser, url) as page:
        expect(page.get_by_label("Model")).to_have_value("fake")
        held: list[Route] = []
        page.route("**/v1/models", lambda route: held.append(route))
        with page.expect_request("**/v1/models"):
            page.reload()
        page.get_by_label("Question").fill("Hi")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        assert page.get_by_label("Model").input_value() == ""
        held[0].continue_()
        expect(page.locator(".assistant .about")).to_contain_text("tokens")
        assert all(answers(page, 1))


def test_choosing_model_and_device(browser: Browser, served: Served) -> None:
    other = FakeModel("fake@other:cpu")
    shelf = Shelf(served.model, (), {"fake@other:cpu": Offer(lambda: other, other.facts, 7)})
    with running(create_app(shelf)) as url, visiting(browser, url) as page:
        expect(page.locator("#device")).to_have_text("on fake:cpu")
        page.get_by_label("Model").select_option("fake@other:cpu")
        expect(page.locator("#device")).to_have_text("opened on demand")
        longest(page, 3)
        ask(page, "Hi")
        expect(page.locator(".assistant .about")).to_contain_text("3 tokens")
        expect(page.locator("#device")).to_have_text("on fake:cpu")  # what that one says of itself
        assert shelf.texts["fake@other:cpu"].model is other
        page.reload()
        expect(page.get_by_label("Model")).to_have_value("fake@other:cpu")  # it is remembered
        picture(page, "devices")
    shelf.close()


def test_stopping(browser: Browser, served: Served) -> None:
    with running(create_app(served.model)) as url, visiting(browser, url) as page:
        served.gate.clear()
        ask(page, "Hi")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        expect(page.get_by_role("button", name="Send")).to_be_disabled()
        page.keyboard.press("Escape")
        expect(page.locator(".assistant .about")).to_contain_text("stopped")
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        served.gate.set()
        longest(page, 3)
        ask(page, "Again")
        expect(page.locator(".assistant .about").nth(1)).to_contain_text("3 tokens")


def test_by_keyboard_alone(browser: Browser, served: Served) -> None:
    with running(create_app(served.model, max_new_tokens=5)) as url, visiting(browser, url) as page:
        expect(page.get_by_label("Model")).to_have_value("fake")
        expect(page.get_by_label("Question")).to_be_focused()
        page.keyboard.type("One")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("Two")
        page.keyboard.press("Enter")
        expect(page.locator(".user .said")).to_have_text("One\nTwo")
        expect(page.locator(".assistant .about")).to_contain_text("tokens")
        reached = set()
        for _ in range(14):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id"))
        assert {"Send", "New chat", "Options", "Chat", "Dashboard", "Edit", "Try again"} <= reached


def test_errors_are_told_and_the_question_is_not_lost(browser: Browser, served: Served) -> None:
    complaints = [refused("400 (Bad Request)")]
    with running(create_app(served.model)) as url, visiting(browser, url, complaints=complaints) as page:
        ask(page, "x" * 3000)
        expect(page.locator(".failed .said")).to_contain_text("2048")
        page.get_by_role("button", name="Edit").click()
        expect(page.get_by_label("Question")).to_have_value("x" * 3000)


def test_a_key_is_asked_for(browser: Browser, served: Served) -> None:
    app = create_app(served.model, api_key="s3cret", max_new_tokens=3)
    complaints = [refused("401 (Unauthorized)")] * 2  # without a key, and with the wrong one
    with running(app) as url, visiting(browser, url, complaints=complaints) as page:
        expect(page.get_by_role("alert")).to_contain_text("API key is needed")
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("wrong")
        page.get_by_label("API key").fill("s3cret")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_be_hidden()
        ask(page, "Hi")
        expect(page.locator(".assistant .about")).to_contain_text("3 tokens")


@pytest.mark.parametrize(("name", "more"), [
    ("dashboard", {}),
    ("dashboard-dark-phone", {"color_scheme": "dark", "viewport": {"width": 360, "height": 740}}),
])  # fmt: skip
def test_the_dashboard(browser: Browser, served: Served, name: str, more: dict[str, Any]) -> None:
    with (
        running(create_app(served.model, max_new_tokens=20, memory_budget=2**30)) as url,
        visiting(browser, url, **more) as page,
    ):
        ask(page, "Hi")
        expect(page.locator(".assistant .about")).to_contain_text("tokens")
        picture(page, f"{name}-chat")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_role("button", name="Dashboard").click()
        tiles = page.locator("#tiles .card")
        expect(tiles).to_have_count(6)
        expect(tiles.nth(0)).to_contain_text("of a budget of 1024 MiB")
        expect(tiles.nth(2)).to_contain_text("of 8,192 tokens at work")
        expect(tiles.nth(4)).to_have_text(re.compile(r"First token, P50\d+(\.\d)? ms"))
        expect(page.locator("#tiers tbody tr")).to_have_text("local100")
        expect(page.locator("#models tbody tr")).to_contain_text("fake:cpu")
        expect(page.locator("#requests tbody tr")).to_contain_text("/v1/chat/completions")
        expect(page.locator("#requests .bar")).to_have_attribute(
            "aria-label", re.compile(r"prompt \d+ ms, answer \d+ ms")
        )
        for _ in range(4):
            page.evaluate("edgeGlm.dashboard.update()")
        points = page.locator("#plots polyline").first
        expect(points).to_have_attribute("points", re.compile(r"^(\S+,\S+ ){3,}"))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(19, 21, 23)" if more else "rgb(247, 247, 245)"
        )
        picture(page, name)


def test_quantiles_as_prometheus_has_them(browser: Browser, served: Served) -> None:
    with running(create_app(served.model)) as url, visiting(browser, url) as page:
        found = page.evaluate(
            """async () => {
              const { parse, quantile } = await import("/ui/dashboard.js");
              const text = 'h_bucket{le="1.0",model="a"} 2\\nh_bucket{le="2.0",model="a"} 6\\n'
                + 'h_bucket{le="+Inf",model="a"} 8\\n# HELP h x\\nh_count 8\\n';
              return [0.25, 0.5, 0.9].map((level) => quantile(parse(text), "h", level)).concat(quantile([], "h", 0.5));
            }"""
        )
        assert found == [1, 1.5, 2, None]


def test_the_files(served: Served) -> None:
    with running(create_app(served.model, api_key="s3cret")) as url:
        page = httpx.get(f"{url}/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        names = set(re.findall(r"ui/[\w.]+", page.text))
        assert names >= {"ui/main.js", "ui/style.css"}
        for name in names:
            assert httpx.get(f"{url}/{name}").status_code == 200
        assert not re.search(r"https?://", page.text)
        for name in ("nothing.js", "..%2fapp.py", "app.py"):
            assert httpx.get(f"{url}/ui/{name}").status_code in (401, 404)
