"""Who may import whom: the arrows of the architecture, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("devices", "edge_runtime", "exporters")
FORMATS = ("onnx", "gguf", "safetensors")


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """Every imported module with the function it is imported in (None: at import time); not those for type checkers."""

    def visit(node: ast.AST, function: str | None) -> Iterator[tuple[str, str | None]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children: list[ast.AST] = list(node.orelse)
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((alias.name, function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module, function
        for child in children:
            inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), None)


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def under(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", modules("devices"), ids=lambda path: path.name)
def test_devices_import_nothing_of_ours(path: Path) -> None:
    assert [name for name, _ in imports(path) if under(name, "edge_runtime", "exporters", *FORMATS)] == []


def test_the_runtime_meets_exporters_in_one_place() -> None:
    met = {
        (path.relative_to(ROOT).as_posix(), function)
        for path in modules("edge_runtime")
        for name, function in imports(path)
        if under(name, "exporters")
    }
    functions = ("export_fetched", "outline_fetched", "_write_baseline")
    assert met == {("edge_runtime/exporting.py", function) for function in functions}


def test_the_runtime_leaves_engines_and_formats_alone() -> None:
    met = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in modules("edge_runtime")
        for name, _ in imports(path)
        if under(name, "onnxruntime", "openvino", *FORMATS)
    }
    # no model's format there, but a container of arrays, two to four times as fast as numpy's own
    store = "edge_runtime/prefix_store.py"
    assert met == {(store, "safetensors"), (store, "safetensors.numpy")}


@pytest.mark.parametrize("path", modules("exporters"), ids=lambda path: path.name)
def test_exporters_know_packages_and_what_goes_wrong_with_disks_only(path: Path) -> None:
    packages = ("edge_runtime.package", "edge_runtime.package_writer", "edge_runtime.recipe")
    allowed = (
        *(*packages, "edge_runtime.errors", "edge_runtime.disk", "edge_runtime.scratch"),
        "edge_runtime.tokenizer_json",  # which keeps a hostile one from the tokenizers library
    )
    foreign = [name for name, _ in imports(path) if under(name, "edge_runtime") and not under(name, *allowed)]
    assert foreign == []
    assert [name for name, _ in imports(path) if under(name, "onnxruntime")] == []


TIERS = {
    "tracing": (),
    "timing": (),
    "tuning": ("timing",),
    "policy": (),
    "egress": ("policy",),
    "tiers": ("policy", "egress", "tracing", "timing"),
    "stages": ("policy",),
    "deferred": ("policy", "tiers", "tracing"),
    "routing": ("policy", "egress", "tiers", "stages", "deferred", "tracing", "timing"),
}
"""Part of edge_runtime → those of these parts that it may know."""


@pytest.mark.parametrize("part", TIERS)
def test_what_meets_the_network_knows_nothing_of_who_decides(part: str) -> None:
    others = [f"edge_runtime.{each}" for each in TIERS if each != part and each not in TIERS[part]]
    for path in modules(f"edge_runtime/{part}"):
        assert [name for name, _ in imports(path) if under(name, *others, "edge_runtime.server")] == [], path


@pytest.mark.parametrize("path", [path for package in OURS for path in modules(package)], ids=str)
def test_no_training_frameworks(path: Path) -> None:
    assert [name for name, _ in imports(path) if under(name, "torch", "transformers", "optimum")] == []


@pytest.mark.parametrize("module", ["edge_runtime", "devices", "edge_runtime.cli.main"])
def test_light(module: str) -> None:
    heavy = (
        "onnxruntime",
        "openvino",
        "onnx",
        "tokenizers",
        "jinja2",
        "starlette",
        "huggingface_hub",
        "exporters",
        "httpx2",
    )
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert module in loaded
    assert [name for name in heavy if name in loaded] == []
