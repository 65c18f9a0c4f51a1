"""What products take over from the operators beside them, and what they must leave."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import NodeProto, helper

from exporters.edge_fusion import fuse


def product(x: str, y: str, *more: str) -> NodeProto:
    return helper.make_node("QuantizedMatMul", [x, f"{y}.weight", *more], [y], y, domain="edge_glm", K=64)


def sum_and_norm(x: str, y: str, total: str, normed: str) -> NodeProto:
    inputs, outputs = [x, y, f"{normed}.weight"], [normed, "", "", total]
    op = "SkipSimplifiedLayerNormalization"
    return helper.make_node(op, inputs, outputs, normed, domain="com.microsoft", epsilon=0.5)


def norm(x: str, normed: str) -> NodeProto:
    inputs = [x, f"{normed}.weight"]
    attributes = {"axis": -1, "epsilon": 0.5, "stash_type": 1}
    return helper.make_node("SimplifiedLayerNormalization", inputs, [normed], normed, **attributes)


def gate(x: str, y: str) -> NodeProto:
    return helper.make_node("GatedUnit", [x], [y], y, domain="edge_glm", activation=2)


def other(x: str, y: str) -> NodeProto:
    return helper.make_node("Relu", [x], [y], y)


def fused(*nodes: NodeProto, kept: str = "out") -> list[tuple[str, list[str], list[str]]]:
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    found = fuse(copies, [kept])
    assert onnx.helper.make_graph(found, "g", [], [])
    return [(node.op_type, list(node.input), list(node.output)) for node in found]


def attributes(node: NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def test_a_block_is_products_alone() -> None:
    nodes = [
        other("in", "x"),
        product("x", "a"),
        sum_and_norm("x", "a", "s", "n"),
        product("n", "b"),
        gate("b", "g"),
        product("g", "c"),
        sum_and_norm("s", "c", "t", "m"),
        product("m", "d"),
        helper.make_node("Add", ["t", "d"], ["out"], "last"),
    ]
    found = fuse(nodes, ["out"])
    assert [(node.op_type, list(node.input), list(node.output)) for node in found] == [
        ("Relu", ["in"], ["x"]),
        ("QuantizedMatMul", ["x", "a.weight", "", "", "x"], ["s"]),
        ("QuantizedMatMul", ["s", "b.weight", "", "n.weight"], ["b"]),
        ("QuantizedMatMul", ["b", "c.weight", "", "", "s"], ["t"]),
        ("QuantizedMatMul", ["t", "d.weight", "", "m.weight", "t"], ["out"]),
    ]
    assert [attributes(node) for node in found[1:]] == [
        {"K": 64},
        {"K": 64, "epsilon": 0.5},
        {"K": 64, "gate": 2},
        {"K": 64, "epsilon": 0.5},
    ]


def test_a_bias_stays_in_its_place() -> None:
    found = fused(norm("x", "n"), product("n", "y", "bias"), other("y", "out"))
    assert found[0] == ("QuantizedMatMul", ["x", "y.weight", "bias", "n.weight"], ["y"])


def test_several_products_norm_the_same_input() -> None:
    found = fused(norm("x", "n"), product("n", "a"), product("n", "b"), kept="a")
    assert [inputs for _, inputs, _ in found] == [["x", "a.weight", "", "n.weight"], ["x", "b.weight", "", "n.weight"]]


def test_what_others_read_stays() -> None:
    for nodes in (
        [norm("x", "n"), product("n", "a"), other("n", "out")],
        [gate("x", "g"), product("g", "a"), other("g", "out")],
        [gate("x", "g"), product("g", "a"), product("g", "b")],
        [other("in", "x"), product("x", "a"), other("a", "b"), helper.make_node("Add", ["x", "a"], ["out"], "add")],
        [other("in", "x"), other("x", "a"), sum_and_norm("x", "a", "s", "n"), other("n", "out")],
        [norm("x", "n"), helper.make_node("MatMul", ["n", "w"], ["out"], "float")],
    ):
        before = [(node.op_type, list(node.input), list(node.output)) for node in nodes]
        assert fused(*nodes) == before


def test_outputs_of_the_graph_stay() -> None:
    for nodes in (
        [norm("x", "out"), product("out", "a")],
        [gate("x", "out"), product("out", "a")],
        [other("in", "x"), product("x", "out"), helper.make_node("Add", ["x", "out"], ["s"], "add")],
    ):
        assert len(fused(*nodes)) == len(nodes)


def test_half_of_a_sum_with_its_norm() -> None:
    x, a = other("in", "x"), product("x", "a")
    found = fused(x, a, sum_and_norm("x", "a", "s", "n"), other("n", "out"))
    assert [op for op, _, _ in found] == ["Relu", "QuantizedMatMul", "SimplifiedLayerNormalization", "Relu"]
    found = fused(x, other("x", "a"), sum_and_norm("x", "a", "s", "n"), product("n", "out"))
    assert [op for op, _, _ in found] == ["Relu", "Relu", "Add", "QuantizedMatMul"]


def test_an_addend_must_be_there_in_time_and_no_constant() -> None:
    late = [product("in", "a"), other("a0", "x"), helper.make_node("Add", ["x", "a"], ["out"], "add")]
    assert [op for op, _, _ in fused(*late)] == ["QuantizedMatMul", "Relu", "Add"]
    constant = [product("in", "a"), helper.make_node("Add", ["constant", "a"], ["out"], "add")]
    assert [op for op, _, _ in fused(*constant)] == ["QuantizedMatMul", "Add"]


def test_one_norm_or_gate_for_a_product() -> None:
    twice = fused(norm("x", "n"), norm("n", "m"), product("m", "out"))
    assert [op for op, _, _ in twice] == ["SimplifiedLayerNormalization", "QuantizedMatMul"]
    both = fused(gate("x", "g"), norm("g", "n"), product("n", "out"))
    assert [op for op, _, _ in both] == ["GatedUnit", "QuantizedMatMul"]
