"""What is left of a cut network is a smaller one, and is refitted to do what the whole one did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporters.compression.cut import Cut, CutCheckpoint
from exporters.compression.repair import RIDGE, fit, repair
from exporters.compression.tensor_folder import TensorFolder
from exporters.quantize import QuantizedCheckpoint
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from exporters.weights import QuantizedTensor, Tensor, dequantize
from tests.exporters.numpy_builder import run
from tests.exporters.random_checkpoint import SHORT, RandomCheckpoint
from tests.exporters.test_families import FOLDER, MODELS
from tests.exporters.test_pruning import IDS

RANDOM = np.random.default_rng(5)


def test_a_fit_is_least_squares_around_the_weights() -> None:
    x, weight = RANDOM.standard_normal((200, 12), np.float32), RANDOM.standard_normal((5, 12), np.float32)
    target = RANDOM.standard_normal((200, 5), np.float32)
    fitted, bias = fit(x, target, weight)
    centred = x - x.mean(0)
    strength = RIDGE * (centred**2).sum() / 12
    # the ridge as further rows: (strength)^½ · (w − weight) = 0
    rows = np.concatenate([centred, np.sqrt(strength) * np.eye(12)])
    values = np.concatenate([target - target.mean(0), np.sqrt(strength) * weight.T])
    expected = np.linalg.lstsq(rows.astype(np.float64), values.astype(np.float64), rcond=None)[0].T
    np.testing.assert_allclose(fitted, expected, atol=1e-4)
    np.testing.assert_allclose(bias, target.mean(0) - expected @ x.mean(0), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_repair_brings_every_family_nearer(name: str, tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(FOLDER / name)
    arch = source.architecture
    ids = np.random.default_rng(2).integers(0, arch.vocab_size, (8, 48))
    layer = arch.num_layers - 2
    half = np.arange(0, arch.inner(layer), 2)
    groups = {layer: tuple(range(arch.kv_heads(layer) - 1))} if arch.kv_heads(layer) > 1 else {}
    cut = Cut(groups=groups, neurons={layer: half})
    fitted = TensorFolder(tmp_path)
    repair(source, cut, ids, fitted)
    states = [run(CutCheckpoint(source, cut, *more), ids[0]) for more in ((), (fitted,))]
    whole = run(source, ids[0])
    before, after = (float(((each - whole) ** 2).mean()) for each in states)
    assert after < before


def test_a_cut_alone_is_a_smaller_network(tmp_path: Path) -> None:
    """The same as zeros in the places of what is cut."""
    source = RandomCheckpoint(SHORT)
    kept = np.setdiff1d(np.arange(128), np.arange(32, 64))
    cut = CutCheckpoint(source, Cut(groups={1: (1,)}, neurons={0: kept}))

    class Zeroed(RandomCheckpoint):
        def tensor(self, name: str) -> Tensor:
            values = np.array(super().tensor(name))
            if name == "layers.1.o":
                values[:, :32] = 0
            if name == "layers.0.down":
                values[:, 32:64] = 0
            return values

    np.testing.assert_allclose(run(cut, IDS), run(Zeroed(SHORT), IDS), rtol=1e-5, atol=1e-5)


def test_codes_stay_codes_where_groups_are_whole() -> None:
    source = QuantizedCheckpoint(RandomCheckpoint(SHORT), "int4")
    whole = CutCheckpoint(source, Cut(groups={0: (1,)}, neurons={0: np.arange(64)}))
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        assert isinstance(whole.tensor(f"layers.0.{name}"), QuantizedTensor), name
    odd = CutCheckpoint(source, Cut(neurons={0: np.arange(0, 128, 2)}))
    assert isinstance(odd.tensor("layers.0.down"), np.ndarray)
    expected = dequantize(source.tensor("layers.0.down"))[:, ::2]
    np.testing.assert_array_equal(odd.tensor("layers.0.down"), expected)
