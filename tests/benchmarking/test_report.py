"""Table, comparison and page, from a result with round numbers."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from edge_runtime.bench.compare import compare, read_baseline
from edge_runtime.bench.html import report
from edge_runtime.bench.metrics import METRICS
from edge_runtime.bench.plots import distribution, line, stacked_bar
from edge_runtime.bench.result import Percentiles, Result, Samples
from edge_runtime.bench.table import table
from edge_runtime.errors import ConfigError
from tests.benchmarking.results import make_result

VOID = {"meta", "br", "hr", "img", "link", "input"}


def server_result() -> Result:
    return make_result(
        device=None,
        weights=None,
        url="http://127.0.0.1:1",
        prefill_tps=None,
        decode_tps=None,
        load_s=None,
        start_s=None,
        peak_rss_bytes=None,
        shares=None,
        shared_prefix=None,
        copying=None,
        nll=None,
        nll_tokens=None,
        concurrency=4,
        rate=2.5,
        request_rate=2.25,
        output_tps=144.0,
        goodput=2.0,
        errors={"503": 2, "stream": 1},
    )


def test_table() -> None:
    lines = table(make_result()).splitlines()
    assert lines[0] == "tiny & co int4 on onnxruntime:cpu"
    assert lines[1] == "512 prompt tokens, 64 new tokens, 1 stream, 5 measured after warm-up, seed 0"
    found = {" ".join(each.split()) for each in lines}
    assert {
        "prefill 1,000 tokens/s",
        "prompt lookup copies 3.0 times as fast, 95% of the drafted tokens held, 2 of 3 answers the same",
        "decode 100.0 tokens/s",
        "time to first token P50 500.0 ms P95 600.0 ms P99 700.0 ms",
        "time per output token P50 10.00 ms P95 11.00 ms P99 12.00 ms",
        "load 0.500 s",
        "peak memory 256 MiB",
        "loss per token 3.25 nats",
        "time per token 90.0% inference engine, 4.0% device layer, 6.0% runtime",
        "shared prefix first token 40.0 times as fast when 1984 of 2000 shared tokens are known",
        "Some <CPU>, 2 cores, 8.00 GiB, load average 0.5 before",
        "edge-glm 0.1.0, numpy 2.0",
    } <= found


def test_table_of_a_server() -> None:
    text = table(server_result())
    assert "on http://127.0.0.1:1\n" in text
    assert "Poisson arrivals at 2.5 a second, up to 4 at once" in text
    assert "measured from Some <CPU>" in text  # the server may be elsewhere
    found = {" ".join(each.split()) for each in text.splitlines()}
    assert {"requests answered 2.25 requests/s", "goodput 2.00 requests/s", "failed 2 × 503, 1 × stream"} <= found
    assert "peak memory" not in text


def test_ratios() -> None:
    baseline = msgspec.to_builtins(make_result(decode_tps=50.0, ttft_ms=Percentiles(250.0, 600.0, 720.0)))
    found = {ratio.metric.path: ratio for ratio in compare(make_result(), baseline, "base.json").ratios}
    assert found["decode_tps"].value == 2.0
    assert found["decode_tps"].verdict == "better"
    assert found["ttft_ms.p50"].value == 2.0
    assert found["ttft_ms.p50"].verdict == "worse"  # a time
    assert found["ttft_ms.p99"].verdict == "equal"  # within the noise
    assert compare(make_result(), baseline, "base.json").differences == ()
    assert "2.00 ▲" in table(make_result(), compare(make_result(), baseline, "base.json"))


def test_a_metric_that_one_side_lacks_has_no_ratio() -> None:
    comparison = compare(server_result(), {"decode_tps": 10, "output_tps": 72, "load_s": 0}, "x")
    assert [(ratio.metric.path, ratio.value) for ratio in comparison.ratios] == [("output_tps", 2.0)]
    nothing = compare(server_result(), {"decode_tps": 10}, "x")
    assert "no figure is in both" in table(server_result(), nothing)


def test_other_conditions_are_told() -> None:
    baseline = msgspec.to_builtins(make_result(prompt_tokens=128, rate=1.0))
    baseline["machine"]["cpu"] = "Another"
    assert compare(make_result(), baseline, "x").differences == (
        "prompt_tokens: 512 here, 128 there",
        "rate: none here, 1.0 there",
        "machine: Some <CPU> here, Another there",
    )
    assert compare(make_result(), {"decode_tps": 1}, "a peer's, which tells nothing").differences == ()


def test_every_metric_is_a_field_of_the_result() -> None:
    fields = msgspec.to_builtins(make_result(output_tps=1.0, request_rate=1.0, goodput=1.0))
    assert [metric.path for metric in METRICS if metric.of(fields) is None] == []


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(msgspec.json.encode(make_result()))
    assert msgspec.convert(read_baseline(path), Result) == make_result()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("decode: 5", "Expecting value"),
        ("[1]", "no figures such as decode_tps"),
        ('{"speed": 5}', "no figures such as decode_tps"),
        ('{"decode_tps": "fast"}', "no figures such as decode_tps"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_unreadable_baselines(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    path = tmp_path / "base.json"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=rf"cannot compare with .*base\.json: .*{message}"):
        read_baseline(path)


class Page(HTMLParser):
    """Checks that tags close in order, and gathers what matters."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("result", "ratio"), [(make_result(), "2.00"), (server_result(), "1.44")], ids=["here", "server"]
)
def test_page_parses_and_needs_nothing_else(result: Result, ratio: str) -> None:
    baseline: dict[str, Any] = {"decode_tps": 50, "output_tps": 100}
    text = report(result, compare(result, baseline, "<b>.json"))
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "video", "audio"}
    assert not [name for name, _ in page.attributes if name in ("src", "href", "xlink:href", "srcset", "style")]
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "Compared with <b>.json" in page.text
    assert "tiny & co" in page.text
    assert f"{ratio} ▲ better" in page.text
    shown = json.loads(page.text[page.text.index("{\n") : page.text.rindex("}") + 1])
    assert msgspec.convert(shown, Result) == result


def test_page_has_a_plot_for_what_there_is() -> None:
    assert report(make_result()).count("<svg") == 4
    assert report(server_result()).count("<svg") == 3  # no shares
    one_piece = server_result()
    one_piece = msgspec.structs.replace(one_piece, tpot_ms=None, itl_ms=None, samples=Samples([5.0], [], []))
    assert report(one_piece).count("<svg") == 1


def points(svg: str) -> list[tuple[float, float]]:
    curve = ElementTree.fromstring(svg).find("polyline")
    assert curve is not None
    return [(float(x), float(y)) for x, y in (point.split(",") for point in curve.attrib["points"].split())]


@pytest.mark.parametrize("samples", [[5.0], [5.0, 5.0], [0.0], [3.0, 1.0, 2.0], [float(i) for i in range(1000)]])
def test_distribution(samples: list[float]) -> None:
    svg = distribution(samples, [("P50", samples[0])], "ms", "a & b")
    curve = points(svg)
    assert curve == sorted(curve, key=lambda point: (point[0], -point[1]))  # rises to the right; SVG's y points down
    rises = [before[1] - after[1] for before, after in pairwise(curve) if before[1] != after[1]]
    assert rises == pytest.approx([rises[0]] * len(samples), abs=0.11)
    dots = ElementTree.fromstring(svg).findall("circle")
    assert len(dots) == (len(samples) if len(samples) <= 200 else 0)


def test_line_starts_at_zero() -> None:
    curve = points(line([(2, 10.0), (3, 10.0), (4, 20.0)], "token", "ms", "x"))
    bottom = 190
    assert bottom - curve[2][1] == pytest.approx(2 * (bottom - curve[0][1]), abs=0.2)
    assert len(points(line([(2, 1.0)], "token", "ms", "x"))) == 1


def test_bar() -> None:
    root = ElementTree.fromstring(stacked_bar([("a", 0.75), ("b", 0.25), ("c", -0.001)], "x"))
    widths = [float(part.attrib["width"]) for part in root.findall("rect") if part.attrib["height"] == "34.0"]
    assert widths[0] > 2.9 * widths[1] > 0
    assert all(width > 0 for width in widths)  # noise may push a share below nothing
