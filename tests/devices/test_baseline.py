"""The unfused graph on both engines, against Transformers' fp32 logits of every family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from devices.baseline import Baseline, open_baseline
from devices.errors import EngineError
from edge_runtime.errors import UnsupportedModel
from exporters.graphs import write_baseline
from exporters.onnx_baseline_builder import OnnxBaselineBuilder
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from tests.decoder_spec import decoder_spec

FAMILIES = sorted((Path(__file__).parents[1] / "fixtures" / "families").iterdir())
LENGTHS = (7, 24, 72)


class Case(NamedTuple):
    baseline: Baseline
    ids: NDArray[np.int64]
    logits: dict[int, NDArray[np.float32]]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda folder: folder.name)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("baseline")
    return request.param, folder / write_baseline(SafetensorsCheckpoint(request.param), folder, folder)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def case(request: pytest.FixtureRequest, graph: tuple[Path, Path]) -> Iterator[Case]:
    family, file = graph
    spec = decoder_spec(SafetensorsCheckpoint(family).architecture, "onnxruntime", file)
    baseline = open_baseline(spec, request.param, threads=2)
    with np.load(family / "reference.npz") as arrays:
        yield Case(
            baseline,
            arrays["ids"].astype(np.int64),
            {length: arrays[f"logits_{length}"] for length in LENGTHS},
        )
    baseline.close()
    baseline.close()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_whole_prompt(case: Case, length: int) -> None:
    case.baseline.begin(length)
    got = case.baseline.forward(case.ids[:length], rows=length)
    np.testing.assert_allclose(got, case.logits[length][:length], atol=1e-3, rtol=0)


@pytest.mark.parametrize("length", LENGTHS)
def test_token_by_token_after_a_prompt(case: Case, length: int) -> None:
    case.baseline.begin(length)
    rows = [case.baseline.forward(case.ids[:5])]
    rows += [case.baseline.forward(case.ids[place : place + 1]) for place in range(5, length)]
    np.testing.assert_allclose(np.concatenate(rows), case.logits[length][4:length], atol=1e-3, rtol=0)


def test_nothing_is_fused(graph: tuple[Path, Path]) -> None:
    nodes = onnx.load(graph[1], load_external_data=False).graph.node
    assert {node.domain for node in nodes} == {""}
    assert not {node.op_type for node in nodes} & {"Attention", "RMSNormalization", "RotaryEmbedding", "QuickGelu"}


def test_what_cannot_be_run(case: Case, tmp_path: Path) -> None:
    fresh = type(case.baseline)(case.baseline._spec)
    with pytest.raises(ValueError, match="context"):
        fresh.forward(case.ids[:3])
    fresh.close()
    case.baseline.begin(4)
    too_many = np.zeros(case.baseline._spec.max_context + 1, np.int64)
    with pytest.raises(ValueError, match="context"):
        case.baseline.forward(too_many)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_broken_file(tmp_path: Path, engine: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    arch = SafetensorsCheckpoint(FAMILIES[0]).architecture
    with pytest.raises(EngineError, match="loading"):
        open_baseline(decoder_spec(arch, "onnxruntime", tmp_path / "model.onnx"), engine)


def test_weights_that_it_does_not_take() -> None:
    with pytest.raises(UnsupportedModel, match="fp32"):
        OnnxBaselineBuilder(SafetensorsCheckpoint(FAMILIES[0]).architecture, "int4")
