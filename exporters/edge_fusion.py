"""Norms, gates and residual sums taken into the products beside them (QuantizedMatMul).

What lies between two products costs an operator's start and a trip through memory each; for one token that is a tenth
of its time. A norm or a gate in front becomes part of how a product reads its input, a sum behind it part of how it
writes its output. What has another reader, or no such product beside it, stays an operator of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from onnx import NodeProto, helper

from exporters.onnx_graph import MICROSOFT

PRODUCT = "QuantizedMatMul"
_NORM, _SUM_AND_NORM, _GATE = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "GatedUnit"
_X, _NORM_WEIGHT, _ADDEND = 0, 3, 4
"""Places among a product's inputs."""


def fuse(nodes: Sequence[NodeProto], kept: Iterable[str]) -> list[NodeProto]:
    """``nodes``, in order, with what products can take over taken over; nodes are changed. ``kept``: values that must
    stay, as a graph's outputs do."""
    graph = _Nodes([part for node in nodes for part in _taken_apart(node)], set(kept))
    for node in list(graph.nodes):
        if node.op_type == "Add":
            graph.take_sum(node)
    for node in list(graph.nodes):
        if node.op_type == _NORM:
            graph.take_norm(node)
        elif node.op_type == _GATE:
            graph.take_gate(node)
    return graph.put_together()


def _taken_apart(node: NodeProto) -> list[NodeProto]:
    """A sum with its norm as two nodes, so that each may go its way; :meth:`_Nodes.put_together` joins what is left."""
    if node.op_type != _SUM_AND_NORM:
        return [node]
    x, y, weight = node.input
    normed, total = node.output[0], node.output[3]
    add = helper.make_node("Add", [x, y], [total], f"{node.name}.sum")
    attributes = {"axis": -1, "epsilon": _attribute(node, "epsilon"), "stash_type": 1}
    return [add, helper.make_node(_NORM, [total, weight], [normed], node.name, **attributes)]


class _Nodes:
    def __init__(self, nodes: list[NodeProto], kept: set[str]) -> None:
        self.nodes = nodes
        self._kept = kept
        self._maker = {value: node for node in nodes for value in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in nodes:
            for value in node.input:
                self._readers.setdefault(value, []).append(node)

    def take_sum(self, add: NodeProto) -> None:
        """``x + product`` → a product with the addend ``x``."""
        x, y = add.input
        product = self._maker.get(y)
        fits = product is not None and product.op_type == PRODUCT and len(product.input) <= _ADDEND
        # x must be there before the product is; a constant has another shape
        if product is None or not fits or not self._sole(y) or x not in self._maker or self._after(x, product):
            return
        _put(product, _ADDEND, x)
        product.output[0] = add.output[0]
        self._maker[add.output[0]] = product
        self._readers[x].append(product)
        self._drop(add)

    def take_norm(self, norm: NodeProto) -> None:
        """A norm that only products read → products that norm their input."""
        x, weight = norm.input
        readers = self._readers.get(norm.output[0], [])
        if norm.output[0] in self._kept or not readers or not all(_reads_plainly(each, norm) for each in readers):
            return
        for product in readers:
            product.input[_X] = x
            _put(product, _NORM_WEIGHT, weight)
            product.attribute.append(helper.make_attribute("epsilon", _attribute(norm, "epsilon")))
            self._readers[x].append(product)
        self._drop(norm)

    def take_gate(self, gate: NodeProto) -> None:
        """A gate that one product reads → a product that gates its input."""
        (x,), (y,) = gate.input, gate.output
        if not self._sole(y) or not _reads_plainly(self._readers[y][0], gate):
            return
        (product,) = self._readers[y]
        product.input[_X] = x
        product.attribute.append(helper.make_attribute("gate", _attribute(gate, "activation")))
        self._readers[x].append(product)
        self._drop(gate)

    def put_together(self) -> list[NodeProto]:
        """Sums and the norms right after them as one operator again, where both are left."""
        joined: list[NodeProto] = []
        for node in self.nodes:
            if joined and _sums(joined[-1], node):
                add = joined.pop()
                inputs, outputs = [*add.input, node.input[1]], [node.output[0], "", "", add.output[0]]
                epsilon = _attribute(node, "epsilon")
                node = helper.make_node(_SUM_AND_NORM, inputs, outputs, node.name, domain=MICROSOFT, epsilon=epsilon)
            joined.append(node)
        return joined

    def _sole(self, value: str) -> bool:
        """Whether one node reads it and nothing else needs it."""
        return len(self._readers.get(value, [])) == 1 and value not in self._kept

    def _after(self, value: str, node: NodeProto) -> bool:
        maker = self._maker[value]
        return next(each is node for each in self.nodes if each is node or each is maker)

    def _drop(self, node: NodeProto) -> None:
        self.nodes = [each for each in self.nodes if each is not node]
        for value in node.input:
            self._readers[value] = [each for each in self._readers[value] if each is not node]


def _sums(add: NodeProto, norm: NodeProto) -> bool:
    """Whether ``norm`` is one of what ``add`` sums."""
    return (add.op_type, norm.op_type) == ("Add", _NORM) and bool(norm.input[0] == add.output[0])


def _reads_plainly(product: NodeProto, made_by: NodeProto) -> bool:
    """Whether ``product`` is one, with ``made_by``'s output as its x and in no other place, not normed or gated yet."""
    places = [place for place, value in enumerate(product.input) if value == made_by.output[0]]
    normed = len(product.input) > _NORM_WEIGHT and bool(product.input[_NORM_WEIGHT])
    gated = any(each.name == "gate" for each in product.attribute)
    return product.op_type == PRODUCT and places == [_X] and not normed and not gated


def _put(node: NodeProto, place: int, value: str) -> None:
    node.input.extend([""] * (place + 1 - len(node.input)))
    node.input[place] = value


def _attribute(node: NodeProto, name: str) -> Any:
    return helper.get_attribute_value(next(each for each in node.attribute if each.name == name))
