"""A real browser (Debian's Chromium, driven by Playwright), and pages in it that are watched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PICTURES = os.environ.get("EDGE_GLM_TEST_PICTURES")
"""A folder for screenshots, for who wants to look."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def visiting(browser: Browser, url: str, *, complaints: Sequence[str] = (), **context: Any) -> Iterator[Page]:
    """A page at ``url``, which may ask for nothing outside of it, throw nothing, and say no more than ``complaints`` in
    the console. ``context``: what is special about the browser, as ``new_context`` takes it."""
    opened = browser.new_context(**context)
    try:
        page = opened.new_page()
        page.set_default_timeout(15_000)
        problems: list[str] = []
        page.on(
            "request",
            lambda request: None if f"{request.url}/".startswith(f"{url}/") else problems.append(request.url),
        )
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        yield page
        page.evaluate("null")  # with its answer has come what was complained of before
        assert problems == [*complaints], problems
    finally:
        opened.close()


def picture(page: Page, name: str, **options: Any) -> None:
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"), **options)
