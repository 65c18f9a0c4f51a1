"""The sums of a footprint, and that an open decoder's own figures are in them."""

from __future__ import annotations

import pytest

from devices import DecoderOptions, open_decoder
from devices.base import Engine
from devices.kv_types import KVType
from edge_runtime import footprint as module
from edge_runtime.footprint import (
    KV_TYPES,
    Model,
    Use,
    footprint,
    kv_bytes_per_token,
    least_budget,
    tokens_needed,
    tokens_within,
)
from edge_runtime.package import ArchitectureSummary, Package, Weights
from exporters.export import export
from exporters.synthetic import SyntheticCheckpoint
from tests.conftest import EXPORTS, usable

MIB = 1 << 20
DEVICES: dict[str, Engine] = {
    "edge:cpu": "onnxruntime-edge",
    "onnxruntime:cpu": "onnxruntime",
    "openvino:cpu": "openvino",
}
SHAPE = ArchitectureSummary(
    family="llama",
    parameters=10**9,
    num_layers=28,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    hidden_size=2048,
    vocab_size=59264,
    max_context=8192,
    tied_head=False,
)
MODEL = Model(SHAPE, "onnxruntime-edge", "int4", 1000 * MIB)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("made") / "tiny"
    for weights in ("int4", "fp32"):
        export(SyntheticCheckpoint("tiny"), folder, EXPORTS, weights)
    return Package.open(folder)


@pytest.mark.parametrize("weights", ["int4", "fp32"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_token_takes_what_the_decoder_says(device: str, weights: Weights, tiny: Package) -> None:
    variant = tiny.variant(DEVICES[device], weights)
    assert variant is not None
    kinds: tuple[KVType | None, ...] = (None, *KV_TYPES[variant.engine])
    for kv_type in kinds:
        decoder = open_decoder(tiny.spec(variant), usable(device), DecoderOptions(kv_type=kv_type))
        try:
            assert kv_bytes_per_token(Model.of(tiny, variant), kv_type) == decoder.limits.kv_bytes_per_token
        finally:
            decoder.close()


def test_a_manifest_says_whether_the_head_is_the_embedding(tiny: Package) -> None:
    assert tiny.manifest.architecture.tied_head is True


def test_the_peak_is_loading_or_running_whatever_is_more() -> None:
    parts = footprint(MODEL, Use(8192))
    assert parts.peak == sum(parts) - min(parts.loading, parts.kv + parts.prefix + parts.activations)
    loading = footprint(MODEL._replace(engine="onnxruntime"), Use(1, 1))
    assert loading.loading > loading.kv + loading.activations
    assert loading.peak == loading.base + loading.weights + loading.loading


def test_more_of_anything_takes_more() -> None:
    one = footprint(MODEL, Use(1024, 1, 256))
    assert footprint(MODEL, Use(2048, 1, 256)).kv > one.kv
    assert footprint(MODEL, Use(1024, 16, 256)).activations > one.activations
    assert footprint(MODEL, Use(1024, 1, 512)).activations > one.activations
    assert footprint(MODEL, Use(1024, 1, 256, prefix_store=True)).prefix > 0
    assert footprint(MODEL, Use(1024, 1, 256, "int8")).kv < one.kv
    assert footprint(MODEL._replace(nbytes=2000 * MIB), Use(1024, 1, 256)).weights > one.weights
    assert footprint(MODEL, Use(1024, 1, 256), resident=900 * MIB).base == 900 * MIB
    unknown = MODEL._replace(architecture=_tied(None), engine="openvino")
    assert footprint(unknown, Use(1)).weights == footprint(unknown._replace(architecture=_tied(True)), Use(1)).weights
    assert footprint(unknown, Use(1)).weights > footprint(MODEL._replace(engine="openvino"), Use(1)).weights


@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-edge", "openvino"])
def test_tokens_within_are_the_most_that_fit(engine: Engine) -> None:
    model, use = MODEL._replace(engine=engine), Use(8192, 4)
    budget = footprint(model, use).budget - 50 * MIB
    tokens = tokens_within(budget, model, use)
    assert 0 < tokens < 8192
    fitting, over = (footprint(model, use._replace(tokens=count)) for count in (tokens, tokens + 1))
    assert fitting.peak < fitting.budget <= budget < over.budget
    assert tokens_within(footprint(model, use).budget, model, use) == 8192
    assert tokens_within(1, model, use) == 0


def test_the_least_budget_is_enough_and_no_byte_too_much() -> None:
    use = Use(8192, 16, prefix_store=True)
    least = least_budget(MODEL, use)
    assert tokens_within(least, MODEL, use._replace(prefix_store=False)) >= tokens_needed(MODEL, use) == 256
    assert tokens_within(least - 1, MODEL, use._replace(prefix_store=False)) < 256


def _tied(value: bool | None) -> ArchitectureSummary:
    fields = {name: getattr(SHAPE, name) for name in SHAPE.__struct_fields__}
    return ArchitectureSummary(**{**fields, "tied_head": value})


@pytest.mark.parametrize(
    ("found", "less"),
    [
        (("AVX2",), False),
        (("AVX2", "AVX-VNNI"), True),
        (("AVX2", "AVX-512", "AVX-512 VNNI"), True),
        (("AVX2", "AVX-VNNI", "AVX-512", "AVX-512 VNNI", "AMX-INT8"), False),
        ((), False),
    ],
)
def test_what_an_engine_generates_depends_on_the_processor(
    found: tuple[str, ...], less: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def activations(engine: Engine, *instructions: str) -> int:
        monkeypatch.setattr(module, "instructions", lambda: instructions)
        module._generates_less.cache_clear()
        return footprint(MODEL._replace(engine=engine), Use(64, sequences=16)).activations

    try:
        most = activations("openvino", "AMX-INT8")
        assert activations("openvino", *found) == most - (16 * 2 * MIB if less else 0)
        assert activations("onnxruntime-edge", *found) == activations("onnxruntime-edge", "AMX-INT8")
    finally:
        module._generates_less.cache_clear()
