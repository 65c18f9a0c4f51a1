"""What was found reaches a model that is opened, where nothing else was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import edge_runtime.loading
from devices.base import Decoder, DecoderOptions, DecoderSpec
from devices.registry import open_decoder
from edge_runtime import EdgeLLM
from edge_runtime.machine import fingerprint
from edge_runtime.package import Package
from edge_runtime.paths import home
from edge_runtime.settings import load_settings
from edge_runtime.tuning.log import TuningLog
from edge_runtime.tuning.records import Options, Setup
from tests.tuning.machine import new_run

DEVICE = "onnxruntime:cpu"
SPINNING = {"session.intra_op.allow_spinning": "0"}
BEST = Setup(DEVICE, Options(threads=1, prefill_chunk=128, properties=SPINNING))
Open = Callable[..., DecoderOptions]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_GLM_HOME", str(tmp_path_factory.mktemp("home")))
        with EdgeLLM("synthetic:tiny", DEVICE) as llm:
            yield llm.package


@pytest.fixture(autouse=True)
def empty(package: Package) -> Iterator[None]:
    """A log in which nothing is, before and after."""
    yield
    home().tuning.unlink(missing_ok=True)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the model and tells how."""
    seen: list[DecoderOptions] = []

    def noting(spec: DecoderSpec, device: str, options: DecoderOptions) -> Decoder:
        seen.append(options)
        return open_decoder(spec, device, options)

    monkeypatch.setattr(edge_runtime.loading, "open_decoder", noting)

    def run(**arguments: object) -> DecoderOptions:
        EdgeLLM("synthetic:tiny", **{"device": DEVICE, **arguments}).close()  # type: ignore[arg-type]
        return seen.pop()

    return run


def keep(package: Package, best: Setup | None = BEST, **changes: object) -> None:
    (variant,) = (each for each in package.manifest.variants if each.engine == "onnxruntime")
    values = {
        "machine": fingerprint(),
        "variants": {DEVICE: variant.digest},
        "default": Setup(DEVICE),
        "best": best,
        "gain": 1.234,
        **changes,
    }
    TuningLog(home().tuning, fingerprint()).keep(new_run(**values))


def test_as_it_comes(opened: Open) -> None:
    options = opened()
    assert (options.threads, options.prefill_chunk, options.properties) == (None, 256, {})


def test_what_was_found_is_taken_and_told(package: Package, opened: Open) -> None:
    keep(package)
    options = opened()
    assert (options.threads, options.prefill_chunk, options.properties) == (1, 128, SPINNING)
    with EdgeLLM("synthetic:tiny", DEVICE) as llm:
        told = "tuned 2026-11-26: threads 1, chunk 128, session.intra_op.allow_spinning=0: 1.23 times the default"
        assert llm.reason == llm.placement["reason"] == f"it was asked for; {told}"
        assert len(llm.generate("hello " * 40).text) > 0


def test_what_is_asked_for_is_stronger(package: Package, opened: Open) -> None:
    keep(package)
    options = opened(threads=2)
    assert (options.threads, options.prefill_chunk) == (2, 128)
    with EdgeLLM("synthetic:tiny", DEVICE, threads=2) as llm:
        assert llm.reason.endswith("; tuned 2026-11-26: chunk 128, session.intra_op.allow_spinning=0")
    keep(package, Setup(DEVICE, Options(threads=1)))
    with EdgeLLM("synthetic:tiny", DEVICE, threads=2) as llm:
        assert llm.reason == "it was asked for"


def test_unless_it_is_not_wanted(package: Package, opened: Open) -> None:
    keep(package)
    assert opened(tuning=False).threads is None
    assert opened(tuning=Options()).threads is None
    assert opened(tuning=Options(prefill_chunk=512)).prefill_chunk == 512


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": "another"},
        {"variants": {DEVICE: "of other files"}},
        {"workload": "many"},
        {"best": None},
        {"best": Setup(DEVICE)},
        {"best": Setup("openvino:cpu", Options(threads=1))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_where_it_does_not_count(package: Package, opened: Open, changes: dict[str, object]) -> None:
    keep(package, **{"best": BEST, **changes})  # type: ignore[arg-type]
    assert opened() == opened(tuning=False)


def test_of_the_work_at_hand(package: Package, opened: Open) -> None:
    keep(package, workload="many")
    assert opened(workload="many").threads == 1
    assert opened().threads is None


def test_a_broken_log_changes_nothing(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    home().tuning.write_bytes(b"[{")
    assert opened().threads is None
    assert [record.message for record in caplog.records if "tune again to replace it" in record.message]


def test_a_budget_is_not_passed(package: Package, opened: Open) -> None:
    keep(package, Setup(DEVICE, Options(threads=1, prefill_chunk=512)))
    assert opened().prefill_chunk == 512
    short = opened(memory_budget="2GiB")
    assert (short.threads, short.prefill_chunk) == (1, 256)
    assert short.kv_tokens == opened(memory_budget="2GiB", tuning=False).kv_tokens


def test_the_kv_cache_is_left_to_batch_invariance(package: Package) -> None:
    """Which OpenVINO refuses with 8 bits."""
    with EdgeLLM("synthetic:tiny", "openvino:cpu") as llm:
        variant = llm.variant
    best = Setup("openvino:cpu", Options(kv_type="int8", threads=1))
    keep(package, best, variants={"openvino:cpu": variant.digest}, default=Setup(DEVICE))
    with EdgeLLM("synthetic:tiny", "openvino:cpu") as llm:
        assert llm.reason.endswith(f"tuned 2026-11-26: threads 1, KV cache int8: 1.23 times the default ({DEVICE})")
    with EdgeLLM("synthetic:tiny", "openvino:cpu", batch_invariant=True) as llm:
        assert llm.reason.endswith("; tuned 2026-11-26: threads 1")


def test_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings({}, {}).tuning
    assert not load_settings({}, {"EDGE_GLM_TUNING": "false"}).tuning
    assert not load_settings({"tuning": False}, {"EDGE_GLM_TUNING": "true"}).tuning
