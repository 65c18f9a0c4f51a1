"""Table and page, from a profile with round numbers; the page in a real browser, without any network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from edge_runtime.profiling import charts
from edge_runtime.profiling.charts import request_chart
from edge_runtime.profiling.html import report
from edge_runtime.profiling.memory_plot import memory_plot
from edge_runtime.profiling.result import Limits, Result
from edge_runtime.profiling.table import table
from tests.benchmarking.test_report import Page as Parsed
from tests.browser import picture, visiting
from tests.profiling.profiles import make_profile, two_lanes


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_table() -> None:
    lines = squeezed(table(make_profile().result))
    assert lines[0] == "tiny & co int4 on edge:cpu"
    assert "decode 5.00 18.50 19.70 8.00 28.7% 28.7%" in lines
    assert "QuantizedMatMul 576 → 3072 30 2.00 50.0% 61% 2%" in lines
    assert "Kind0 1 0.010 0.2% - -" in lines
    assert "3 more kinds 3 0.030 0.8%" in lines
    assert (
        "prefill: 2 calls of 256 tokens, 150.0 ms each (148.0 ms with nothing counted), 98.0% of it in operators"
        in lines
    )
    assert "decode: 32 calls of 1 token, 4.00 ms each, 97.5% of it in operators" in lines
    assert (
        "while s cores others' cores voluntary context switches involuntary context switches minor faults major faults"
        in lines
    )
    assert "open 0.500 1.20 0.20 10 2 5,000 0" in lines
    assert "requests 2.00 2.00 0.00 100 - 7 -" in lines
    assert any(
        line.startswith("Critical path, median request of 29.00 ms: prefill 34.5% (engine, 1×)") for line in lines
    )
    assert any(
        line.startswith("peak memory 170.0 MiB of 179.0 MiB planned for this work (base 80.0 MiB") for line in lines
    )
    assert "budget 256.0 MiB, 200.0 MiB with a full KV cache" in lines
    assert any("50.0 GB/s of memory, 250 G float operations/s, 2,000 G integer operations/s" in line for line in lines)


@pytest.mark.parametrize(("share", "cell"), [(1.05, "105%"), (1.06, "cached"), (None, "-")])
def test_what_came_faster_than_memory_gives_was_cached(share: float | None, cell: str) -> None:
    phase = make_profile().result.phases[1]
    (group,) = phase.groups
    result = make_profile(
        phases=[msgspec.structs.replace(phase, groups=[msgspec.structs.replace(group, of_bandwidth=share)])]
    )
    assert f"QuantizedMatMul 576 → 3072 30 2.00 50.0% {cell} 2%" in squeezed(table(result.result))
    assert f">{cell}</td>" in report(result)
    assert json.loads(msgspec.json.encode(result.result))["phases"][0]["groups"][0]["of_bandwidth"] == share


def test_a_shared_machine_is_told() -> None:
    result = make_profile().result
    assert "shared machine" not in table(result)
    shared = msgspec.structs.replace(result, usage=[msgspec.structs.replace(result.usage[-1], other_cpu_s=3.0)])
    assert "others had 1.5 of 2 cores while requests ran" in table(shared)
    assert "others had 1.5 of 2 cores" in report(msgspec.structs.replace(make_profile(), result=shared))


def test_what_is_missing_is_said() -> None:
    text = table(make_profile(phases=[], no_operators="npu has no counters").result)
    assert "no operators: npu has no counters" in text
    assert "GB/s" not in text
    page = report(make_profile(phases=[], no_operators="npu has <no> counters"))
    assert "npu has &lt;no&gt; counters" in page


def test_a_bandwidth_that_could_not_be_measured_is_said() -> None:
    text = table(make_profile(limits=Limits(None, 250e9, 2000e9)).result)
    assert "of at most 250 G float operations/s, 2,000 G integer" in text
    assert "; too little memory was free to measure its bandwidth\n" in text
    assert "cached" not in text


def test_page_needs_nothing_else() -> None:
    profile = make_profile()
    text = report(profile)
    assert "http:" not in text
    assert "https:" not in text
    page = Parsed(text)
    assert not page.tags & {"link", "img", "iframe", "object", "embed", "base", "video", "audio"}
    assert not [name for name, _ in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in text
    assert "import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "Some <Attention>" in page.text
    shown, _ = json.JSONDecoder().raw_decode(page.text, page.text.index("{\n"))
    assert msgspec.convert(shown, Result) == profile.result


def test_bars_that_are_left_out_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "MOST_BARS", 5)
    rows = request_chart(two_lanes(), "the median request").rows
    assert [row.name for row in rows] == [
        "request",
        "critical path, the first 5 of 9",
        "caller",
        "engine, the first 5 of 6",
    ]
    assert [len(row.bars) for row in rows] == [1, 5, 5, 5]


def test_a_plan_and_its_budget_are_drawn() -> None:
    memory = make_profile().result.memory
    plot = memory_plot(memory)
    assert plot.count("<rect") == 4
    assert 'class="limit"' in plot
    assert "budget 256.0 MiB" in plot
    for name in ("open", "warm up", "requests", "close"):
        assert f">{name}</text>" in plot  # though two of them begin together
    far = memory_plot(msgspec.structs.replace(memory, budget=64 << 30))
    assert 'class="limit"' not in far
    assert "polyline" in memory_plot(msgspec.structs.replace(memory, budget=None, planned={}, samples=[(0.0, 1 << 20)]))


# ---- in a browser


@contextmanager
def shown(browser: Browser, folder: Path, **context: Any) -> Iterator[Page]:
    """The page, once its charts are drawn."""
    path = folder / "profile.html"
    path.write_text(report(make_profile()), encoding="utf-8")
    with visiting(browser, path.as_uri(), **context) as page:
        expect(page.locator("canvas.flame[data-to]")).to_have_count(2)
        yield page


def first_chart(page: Page) -> Locator:
    return page.locator("canvas.flame").first


def expect_window(page: Page, start: int, end: int) -> None:
    """What of the first chart is to be shown, in microseconds."""
    expect(first_chart(page)).to_have_attribute("data-from", str(start))
    expect(first_chart(page)).to_have_attribute("data-to", str(end))


def colours(page: Page) -> set[str]:
    """Of the pixels of the first chart."""
    script = """canvas => { const found = new Set();
        const made = new OffscreenCanvas(canvas.width, canvas.height);
        const copy = made.getContext("2d", { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        const data = copy.getImageData(0, 0, canvas.width, canvas.height).data;
        for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) found.add(data.slice(i, i + 3).join());
        return [...found]; }"""
    return set(first_chart(page).evaluate(script))


def test_the_flame_chart_is_drawn_and_can_be_zoomed(browser: Browser, tmp_path: Path) -> None:
    with shown(browser, tmp_path) as page:
        chart = first_chart(page)
        expect_window(page, 0, 29_000)
        assert len(colours(page)) > 6  # a colour for each part
        box = chart.bounding_box()
        assert box is not None
        # rows: request, critical path, caller, engine; the engine's prefill is from 5 to 15 of 29 ms
        prefill = (box["width"] * 10 / 29, 20 + 3 * 38 + 14 + 10)
        chart.hover(position={"x": prefill[0], "y": prefill[1]})
        expect(page.locator(".told").first).to_have_text("engine: prefill, 10.000 ms at 5.000 ms")
        page.get_by_role("button", name="zoom in").first.click()
        expect_window(page, 7_250, 21_750)
        chart.focus()
        page.keyboard.press("ArrowRight")
        expect_window(page, 10_150, 24_650)
        page.get_by_role("button", name="all").first.click()
        expect_window(page, 0, 29_000)
        chart.hover(position={"x": prefill[0], "y": prefill[1]})
        page.mouse.wheel(0, -100)
        page.wait_for_function("document.querySelector('canvas.flame').dataset.to < 29000")
        start, end = chart.evaluate("canvas => [+canvas.dataset.from, +canvas.dataset.to]")
        assert start < 10_000 < end  # what lay under the pointer is there still
        page.mouse.down()
        page.mouse.move(box["x"] + prefill[0] + 50, box["y"] + prefill[1])
        page.mouse.up()
        page.wait_for_function("start => document.querySelector('canvas.flame').dataset.from < start", arg=start)
        picture(page, "profile-light", full_page=True)


def test_the_page_is_dark_where_the_system_is(browser: Browser, tmp_path: Path) -> None:
    with (
        shown(browser, tmp_path, color_scheme="light") as light,
        shown(browser, tmp_path, color_scheme="dark") as dark,
    ):
        background = "getComputedStyle(document.body).backgroundColor"
        assert light.evaluate(background) == "rgb(247, 247, 245)"
        assert dark.evaluate(background) == "rgb(19, 21, 23)"
        before = colours(dark)
        assert not colours(light) & before - {"0,0,0", "255,255,255"}
        picture(dark, "profile-dark", full_page=True)
        dark.emulate_media(color_scheme="light")
        drawn = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        dark.evaluate(drawn)  # a browser tells of the change, upon which it is drawn again, with its next frame
        assert colours(dark) != before


def test_a_phone_has_it_without_scrolling_sideways(browser: Browser, tmp_path: Path) -> None:
    phone = {"viewport": {"width": 375, "height": 700}, "device_scale_factor": 2, "has_touch": True}
    with shown(browser, tmp_path, **phone) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        assert len(colours(page)) > 6
        picture(page, "profile-phone", full_page=True)
