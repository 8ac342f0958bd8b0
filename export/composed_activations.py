"""Activations that an exporter has composed of several operators: GELU, by Erf or by Tanh.

    GELU(x) = x / 2 * (1 + Erf(x / sqrt(2)))    or    x / 2 * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))

The factor 1/2 stands at either operand of the product, or behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

_POINTWISE = ("Add", "Sub", "Mul", "Div", "Pow")


@dataclass(frozen=True)
class Composed:
    """Nodes that are one activation: ``nodes`` compute the output of ``last`` from ``given`` alone, for nobody else."""

    given: ir.Value
    nodes: frozenset[ir.Node]
    last: ir.Node


def composed_activations(graph: ir.Graph, constants: set[ir.Value]) -> Iterator[Composed]:
    """All of ``graph``; ``constants`` are the values that are computed from initializers alone."""
    for node in graph:
        if node.op_type in ("Erf", "Tanh") and (found := _around(node, constants)) is not None:
            yield found


def _around(bend: ir.Node, constants: set[ir.Value]) -> Composed | None:
    """The activation that Erf or Tanh is the heart of."""
    plus_one = _only_reader(bend)
    if plus_one is None or plus_one.op_type != "Add" or len(_live(plus_one, constants)) != 1:
        return None
    bent, product = plus_one, _only_reader(plus_one)
    if product is not None and _scales(product, constants):
        bent, product = product, _only_reader(product)
    if product is None or product.op_type != "Mul" or len(_live(product, constants)) != 2:
        return None
    (factor,) = (value for value in _live(product, constants) if value.producer() is not bent)
    halved, behind = factor.producer(), _only_reader(product)
    nodes, ways = {bend, plus_one, bent, product}, []
    if halved is not None and _scales(halved, constants):
        ways.append((_live(halved, constants)[0], halved, product))
    if behind is not None and _scales(behind, constants):
        ways.append((factor, behind, behind))
    if bent is not plus_one:
        ways.append((factor, bent, product))
    found = (_closed(given, nodes | {half}, last, constants) for given, half, last in ways)
    return next((one for one in found if one is not None), None)


def _closed(given: ir.Value, nodes: set[ir.Node], last: ir.Node, constants: set[ir.Value]) -> Composed | None:
    """``nodes`` and what they are computed by, if that is computed from ``given`` alone and read by no one else."""
    region, todo = set(nodes), [value for node in nodes for value in _live(node, constants)]
    while todo:
        value = todo.pop()
        producer = value.producer()
        if value is given or producer in region:
            continue
        if producer is None or producer.op_type not in _POINTWISE:
            return None
        region.add(producer)
        todo.extend(_live(producer, constants))
    inner = [value for node in region - {last} for value in node.outputs]
    if any(value.is_graph_output() or not {use.node for use in value.uses()} <= region for value in inner):
        return None
    return Composed(given, frozenset(region), last)


def _scales(node: ir.Node, constants: set[ir.Value]) -> bool:
    """Whether ``node`` multiplies one tensor by a constant."""
    return node.op_type in ("Mul", "Div") and len(_live(node, constants)) == 1


def _live(node: ir.Node, constants: set[ir.Value]) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and value not in constants]


def _only_reader(node: ir.Node) -> ir.Node | None:
    """The one node that reads what ``node`` makes."""
    readers = {use.node for use in node.outputs[0].uses()}
    return readers.pop() if len(readers) == 1 else None
