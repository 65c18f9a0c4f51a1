"""From signals to decisions: the regression, its quality, the thresholds, and what comes with Edge-GLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError, EdgeError, PolicyError
from edge_runtime.routing.answer_signals import agreement, confidence_signals, surprise_signals, text_signals
from edge_runtime.routing.calibrate import Observation, Row, calibrate, observe, read_rows
from edge_runtime.routing.calibration import Point, curve, read_calibration, shipped, threshold_for
from edge_runtime.routing.calibration_report import lines, report
from edge_runtime.routing.logistic import Logistic, auroc, fit, roc
from edge_runtime.routing.tasks import right, tasks
from edge_runtime.watch import Confidence, Watch
from tests.tiers.house import FakeLocal


def plain_auroc(scores: Sequence[float], good: Sequence[float]) -> float:
    """The definition."""
    pairs = [
        (s, t) for s, a in zip(scores, good, strict=True) for t, b in zip(scores, good, strict=True) if a > 0.5 > b
    ]
    return sum((s > t) + 0.5 * (s == t) for s, t in pairs) / len(pairs)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_its_definition(rows: list[tuple[float, bool]]) -> None:
    scores, good = [score for score, _ in rows], [float(each) for _, each in rows]
    if 0 < sum(good) < len(good):
        assert auroc(scores, good) == pytest.approx(plain_auroc(scores, good))
        points = roc(scores, good)
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
        assert area == pytest.approx(auroc(scores, good))
    else:
        assert np.isnan(auroc(scores, good))


def test_the_fit_is_where_the_gradient_is_nothing() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(400, 3))
    good = (draw.random(400) < 1 / (1 + np.exp(-(2 * x[:, 0] - x[:, 1] + 0.5)))).astype(float)
    rows = [{"a": row[0], "b": row[1], "c": row[2], "same": 1.0} for row in x]
    fitted = fit(rows, good.tolist(), penalty=4.0)
    weights = dict(zip(fitted.names, fitted.weights, strict=True))
    assert weights["same"] == 0
    assert weights["a"] > 1 > 0 > weights["b"]
    standard = np.clip((x - np.array(fitted.mean[:3])) / np.array(fitted.scale[:3]), -3, 3)
    p = 1 / (1 + np.exp(-(standard @ np.array(fitted.weights[:3]) + fitted.bias)))
    gradient = standard.T @ (p - good) + 4.0 * np.array(fitted.weights[:3])
    assert np.abs(gradient).max() < 1e-6
    assert [fitted(row) for row in rows[:20]] == pytest.approx(p[:20].tolist())
    assert fitted({}) == pytest.approx(1 / (1 + np.exp(-fitted.bias)))  # what is missing counts as its mean
    assert fitted({"a": 1e9}) == fitted({"a": fitted.mean[0] + 3 * fitted.scale[0]})
    with pytest.raises(ValueError, match="good and bad"):
        fit(rows, [1.0] * 400, 1.0)


def test_the_cost_quality_curve() -> None:
    points = curve([0.9, 0.1, 0.5, 0.5], [1, 0, 0, 1], [1, 1, 1, 0.5])
    assert [(point.remote_share, round(point.quality * 3.5, 6)) for point in points] == [
        (0.0, 2),
        (0.25, 3),
        (0.75, 3.5),
        (1.0, 3.5),
    ]
    assert threshold_for(points, share=0.5).remote_share == 0.25
    assert threshold_for(points, quality=0.99).remote_share == 0.75
    assert threshold_for([Point(0, 0, 0.5), Point(1, 1, 0.9)], quality=0.99).remote_share == 1
    assert 0.1 < threshold_for(points, share=0.5).threshold < 0.5


def test_answers_are_judged_by_what_they_say() -> None:
    assert right("The answer is 12.", "12")
    assert not right("The answer is 120.", "12")
    assert not right("6 + 6 = 11, or 12 in other words? No, 11.", "12")
    assert right("Sorted: 1, 2 and 3? No: 1, 2, 3", "1 2 3")
    assert not right("1, 3, 2", "1 2 3")
    assert right('"Carla blue"', "carla blue")
    assert not right("", "x")


def test_tasks_have_two_halves_and_grow() -> None:
    train, test = list(tasks("train", 300)), list(tasks("test", 300))
    assert not {task.family for task in train} & {task.family for task in test}
    assert len({task.family for task in train}) >= 10
    assert list(tasks("test", 10)) == test[:10]
    assert list(tasks("test", 10, seed=1)) != test[:10]
    sums = [task for task in tasks("train", 600) if task.family == "addition"]
    assert len(max(task.answer for task in sums)) > 0
    assert max(len(task.answer) for task in sums) >= 4 > min(len(task.answer) for task in sums)
    for task in (*train, *test):
        assert right(task.answer, task.answer)


def test_signals_of_an_answer() -> None:
    sure = confidence_signals([Confidence(-0.1, 5.0)] * 4)
    unsure = confidence_signals([Confidence(-0.1, 5.0), Confidence(-3.0, 0.1)])
    assert sure["logprob"] > unsure["logprob"]
    assert sure["worst margin"] > unsure["worst margin"]
    assert sure["trend"] == 0 > unsure["trend"]
    assert set(confidence_signals([])) == set(sure)
    watch = Watch()
    assert surprise_signals(watch)["surprise known"] == 0
    watch.surprise = (1.0, 3.0)
    assert surprise_signals(watch) == {"surprise": 2.0, "worst surprise": 0.3, "surprise known": 1.0}
    assert agreement([[1, 2, 3], [1, 2, 3]]) == 1
    assert agreement([[1, 2, 3], [4, 5, 6], [1, 2, 3]]) == pytest.approx(1 / 3)
    assert text_signals("the room is 431", "meeting in room 431")["numbers from the question"] == 1
    assert text_signals("it is 12", "5 + 7")["new numbers"] > 0


def row(good: float, family: str, signal: float) -> Observation:
    said = {"signal": signal, "noise": signal % 0.01}
    return Observation(Row(prompt="x", local_good=good, family=family), said, said, said, good)


def test_calibrating_keeps_families_apart_and_says_what_it_found() -> None:
    draw = np.random.default_rng(1)
    rows = [
        row(float(good), f"family {number % 6}", float(good + draw.normal(0, 0.4)))
        for number in range(300)
        for good in [draw.integers(0, 2)]
    ]
    fitted = calibrate("tiny", rows, share=0.6)
    measured = fitted.calibration.measured
    assert measured is not None
    assert measured.tasks == 100
    assert measured.auroc_during > 0.9
    assert measured.remote_share <= 0.6
    assert measured.quality > 0.9
    told = "\n".join(lines(fitted))
    assert "AUROC" in told
    assert "60%" in told
    page = report(fitted)
    assert page.count("<svg") == 4
    assert "signal" in page
    with pytest.raises(EdgeError, match="cannot be calibrated"):
        calibrate("tiny", [row(1.0, f"family {number % 6}", 0.5) for number in range(30)])
    with pytest.raises(EdgeError, match="rows to fit on"):
        calibrate("tiny", [])


def test_observing_sees_what_the_router_would() -> None:
    local = FakeLocal()
    rows = [Row(prompt=f"number {number}", answer="zzz", max_tokens=20) for number in range(5)]
    seen: list[int] = []
    found = observe(local, local.fake.tokenizer, rows, seen.append)
    local.close()
    assert [each.row for each in found] == rows
    assert seen == [1, 2, 3, 4, 5]
    for each in found:
        assert each.good == 0
        assert set(each.before) < set(each.during) < set(each.consistent)
        assert each.during["surprise known"] == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{nope", "line 2"),
        ('{"prompt": "x", "answer": "y", "colour": 1}', "colour"),
        ('{"answer": "y"}', "give prompt or messages"),
        ('{"prompt": "x"}', "answer or local_good"),
        ('{"prompt": "x", "local_good": 2}', "from 0 to 1"),
        ('{"prompt": "x", "answer": "y", "split": "half"}', "train or test"),
    ],
)
def test_bad_data_is_named_by_its_line(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "x", "answer": "y"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=said) as error:
        read_rows(tmp_path / "data.jsonl")
    assert "line 2" in str(error.value)
    with pytest.raises(ConfigError, match="cannot read"):
        read_rows(tmp_path / "nothing")


def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path) -> None:
    known = shipped("smollm2-135m")
    assert known is not None
    path = tmp_path / "calibration.json"
    path.write_bytes(msgspec.json.encode(known))
    assert read_calibration(path) == known
    path.write_text("{}")
    with pytest.raises(PolicyError, match="is no calibration"):
        read_calibration(path)
    path.write_text(json.dumps({**msgspec.to_builtins(known), "schema": 9}))
    with pytest.raises(PolicyError, match="schema 9"):
        read_calibration(path)
    with pytest.raises(PolicyError, match="cannot read"):
        read_calibration(tmp_path / "nothing")
    assert shipped("another") is None


def test_what_is_shipped_tells_simple_from_hard() -> None:
    """On tasks of which it has seen neither the families nor the numbers; the measurement is in README."""
    known = shipped("smollm2-135m")
    assert known is not None
    assert known.measured is not None
    assert known.measured.auroc_during >= 0.8
    assert isinstance(known.before, Logistic)
