"""Finds activations that an exporter has composed of several operators: swish, and GELU, by Erf or by Tanh.

    swish(x) = x * Sigmoid(x)
    GELU(x) = x / 2 * (1 + Erf(x / sqrt(2)))    or    x / 2 * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))

GELU's factor 1/2 stands at either operand of the product, or behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qat.graph.operations import OpKind

_POINTWISE = ("Add", "Sub", "Mul", "Div", "Pow")


@dataclass(frozen=True)
class ComposedActivation:
    """Nodes that are one activation: they compute the output of ``last`` from ``given``, and nothing else uses them."""

    given: ir.Value
    nodes: frozenset[ir.Node]
    last: ir.Node
    kind: OpKind = "activation"


def composed_activations(graph: ir.Graph, constants: set[ir.Value]) -> Iterator[ComposedActivation]:
    """All of ``graph``; ``constants`` are the values that are computed from initializers only."""
    for node in graph:
        if node.op_type == "Sigmoid" and (found := _find_swish(node)) is not None:
            yield found
        if node.op_type in ("Erf", "Tanh") and (found := _find_activation(node, constants)) is not None:
            yield found


def _find_swish(bend: ir.Node) -> ComposedActivation | None:
    """The swish that the Sigmoid ``bend`` is a part of."""
    product, given, bent = _only_reader(bend), bend.inputs[0], bend.outputs[0]
    if product is None or product.op_type != "Mul" or given is None or bent.is_graph_output():
        return None
    if {*product.inputs} != {given, bent}:
        return None
    return ComposedActivation(given, frozenset((bend, product)), product, "swish")


def _find_activation(bend: ir.Node, constants: set[ir.Value]) -> ComposedActivation | None:
    """The activation that the Erf or Tanh ``bend`` is a part of."""
    plus_one = _only_reader(bend)
    if plus_one is None or plus_one.op_type != "Add" or len(_variable_inputs(plus_one, constants)) != 1:
        return None
    bent, product = plus_one, _only_reader(plus_one)
    if product is not None and _scales(product, constants):
        bent, product = product, _only_reader(product)
    if product is None or product.op_type != "Mul" or len(_variable_inputs(product, constants)) != 2:
        return None
    (factor,) = (value for value in _variable_inputs(product, constants) if value.producer() is not bent)
    halved, behind = factor.producer(), _only_reader(product)
    nodes, ways = {bend, plus_one, bent, product}, []
    if halved is not None and _scales(halved, constants):
        ways.append((_variable_inputs(halved, constants)[0], halved, product))
    if behind is not None and _scales(behind, constants):
        ways.append((factor, behind, behind))
    if bent is not plus_one:
        ways.append((factor, bent, product))
    found = (_complete(given, nodes | {half}, last, constants) for given, half, last in ways)
    return next((one for one in found if one is not None), None)


def _complete(
    given: ir.Value, nodes: set[ir.Node], last: ir.Node, constants: set[ir.Value]
) -> ComposedActivation | None:
    """``nodes`` and all nodes between ``given`` and them.

    None if they compute from anything but ``given``, or if another node reads what they make on the way.
    """
    region, todo = set(nodes), [value for node in nodes for value in _variable_inputs(node, constants)]
    while todo:
        value = todo.pop()
        producer = value.producer()
        if value is given or producer in region:
            continue
        if producer is None or producer.op_type not in _POINTWISE:
            return None
        region.add(producer)
        todo.extend(_variable_inputs(producer, constants))
    inner = [value for node in region - {last} for value in node.outputs]
    if any(value.is_graph_output() or not {use.node for use in value.uses()} <= region for value in inner):
        return None
    return ComposedActivation(given, frozenset(region), last)


def _scales(node: ir.Node, constants: set[ir.Value]) -> bool:
    """Whether ``node`` multiplies one tensor by a constant."""
    return node.op_type in ("Mul", "Div") and len(_variable_inputs(node, constants)) == 1


def _variable_inputs(node: ir.Node, constants: set[ir.Value]) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and value not in constants]


def _only_reader(node: ir.Node) -> ir.Node | None:
    """The node that reads what ``node`` makes; None if several nodes do, or none."""
    readers = {use.node for use in node.outputs[0].uses()}
    return readers.pop() if len(readers) == 1 else None
