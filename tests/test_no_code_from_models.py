"""A model is data: nothing in it is run as code, and its graphs read no file but their own."""

from __future__ import annotations

import ast
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
from onnx import TensorProto, helper
from openvino import opset13 as ops

from edge_runtime.errors import EdgeError, ModelNotFound, UnsupportedModel
from edge_runtime.exporting import export_package
from edge_runtime.package import Package
from tests.runtime.sources import tiny_folder

ROOT = Path(__file__).parents[1]
LOADERS = ("pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "runpy", "code", "yaml", "torch")
CALLS = ("eval", "exec", "compile", "__import__")
"""Of builtins: a name alone, no method."""


def sources() -> list[tuple[str, ast.AST]]:
    paths = [
        path for folder in ("devices", "edge_runtime", "exporters") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert len(paths) > 200
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def test_nothing_in_the_source_runs_data() -> None:
    met = set()
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                met |= {(name, each.name) for each in node.names if each.name.split(".")[0] in LOADERS}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LOADERS:
                met.add((name, str(node.module)))
            elif isinstance(node, ast.Call):
                constant = all(isinstance(each, ast.Constant) for each in node.args)  # the name of a module
                if isinstance(node.func, ast.Name) and node.func.id in CALLS and not constant:
                    met.add((name, node.func.id))
                met |= {
                    (name, str(each.arg))
                    for each in node.keywords
                    if each.arg in ("allow_pickle", "trust_remote_code", "shell")
                }
    assert met == set()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a model was run')",))


CODE = "raise SystemExit('a model was run')"


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    """What Transformers would run with ``trust_remote_code``, and what Python runs by itself."""
    folder = tiny_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", None],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("modeling_evil.py", "tokenization_evil.py", "__init__.py", "sitecustomize.py", "setup.py"):
        (folder / name).write_text(CODE, encoding="utf-8")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    package = export_package(str(folder), tmp_path / "p", ["onnxruntime"], "fp32")
    files = {path.name for path in (tmp_path / "p").rglob("*") if path.is_file()}
    assert not any(name.endswith((".py", ".bin", ".pt")) for name in files)
    assert Package.open(package.folder).name == "p"


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises((ModelNotFound, UnsupportedModel), match=r"safetensors"):
        export_package(str(folder), tmp_path / "p", ["onnxruntime"], "fp32")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(EdgeError, match="not a safetensors file"):
        export_package(str(folder), tmp_path / "p", ["onnxruntime"], "fp32")


def run_onnx(folder: Path, location: str, offset: int = 0, length: int = 16, *, folded: bool = True) -> Any:
    """What is at ``offset`` of a file, by a graph in ``folder`` that says it has four numbers there. ``folded``: it is
    read by the optimizer, as constants are, rather than as weights are."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "one",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not folded:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options).run(None, {})[0]


@pytest.mark.parametrize("place", ["absolute", "up", "down and up", "link"])
def test_an_onnx_graph_reads_no_file_outside_its_folder(place: str, tmp_path: Path) -> None:
    """ONNX Runtime holds that; this holds ONNX Runtime to it."""
    secret, package = tmp_path / "secret.bin", tmp_path / "package"
    package.mkdir()
    secret.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (package / "weights.bin").write_bytes(secret.read_bytes())
    locations = {
        "absolute": str(secret),
        "up": "../secret.bin",
        "down and up": "a/../../secret.bin",
        "link": "link.bin",
    }
    if place == "link":
        (package / "link.bin").symlink_to(secret)

    assert run_onnx(package, "weights.bin").tolist() == [0, 1, 2, 3]
    with pytest.raises(Exception, match=r"[Ee]xternal data path"):
        run_onnx(package, locations[place])


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(10**8, 16), (2**64 - 16, 16), (8, 2**64 - 4), (-16, 16), (0, 10**11), (0, 8), (2**63, 2**63), (8, 16)],
)
def test_an_onnx_graph_reads_nothing_beyond_its_weights(offset: int, length: int, folded: bool, tmp_path: Path) -> None:
    """ONNX Runtime holds that; this holds ONNX Runtime to it."""
    (tmp_path / "weights.bin").write_bytes(np.arange(5, dtype=np.float32).tobytes())
    assert run_onnx(tmp_path, "weights.bin", 4, folded=folded).tolist() == [1, 2, 3, 4]
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run_onnx(tmp_path, "weights.bin", offset, length, folded=folded)


@pytest.mark.parametrize(
    ("offset", "size"),
    [(10**8, 16), (2**64 - 16, 16), (8, 2**64 - 4), (-16, 16), (0, 10**11), (0, 8), (2**63, 2**63)],
)
def test_an_openvino_graph_reads_nothing_beyond_its_weights(offset: int, size: int, tmp_path: Path) -> None:
    """OpenVINO holds that; this holds OpenVINO to it."""
    x = ops.parameter([4], np.float32, name="x")
    model = ov.Model([ops.add(x, ops.constant(np.array([1, 2, 3, 5], np.float32)))], [x], "one")
    path = tmp_path / "model.xml"
    ov.serialize(model, str(path), str(tmp_path / "model.bin"))
    text, count = re.subn(r'offset="0" size="16"', f'offset="{offset}" size="{size}"', path.read_text(encoding="utf-8"))
    assert count == 1
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RuntimeError):
        ov.Core().read_model(str(path))


def test_entities_of_xml_are_not_expanded(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_text(
        '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a SYSTEM "file:///etc/hostname"><!ENTITY b "&a;&a;">]>'
        '<net name="&b;" version="11"></net>',
        encoding="utf-8",
    )
    assert ov.Core().read_model(str(path)).friendly_name == "&b;"
