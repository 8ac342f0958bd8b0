"""Attentions in the form whose factors can be quantized.

(s * q) @ k instead of s * (q @ k), (softmax @ v^T)^T instead of v @ softmax^T, and products instead of equations.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from export.names import all_names, unused_name
from export.onnx_network import constant, permutation
from qat.graph.einsum import product_of_einsum


def scale_before_product(graph: ir.Graph) -> None:
    """Multiplies the first factor of a product of two tensors by the number that its result is multiplied by, in place.

    A division is taken for the multiplication by what is 1 through its number.
    """
    taken = {value.name or "" for node in graph for value in node.outputs}
    for node in list(graph):
        if node.op_type not in ("Mul", "Div") or not _goes_to_softmax(node):
            continue
        position = next((at for at, value in enumerate(node.inputs) if _is_product(value)), None)
        if position is None or (node.op_type == "Div" and position == 1):
            continue
        product, number = node.inputs[position], node.inputs[1 - position]
        values = constant(number)
        if product is None or number is None or values is None or values.size != 1:
            continue
        maker = product.producer()
        assert maker is not None
        first = maker.inputs[0]
        name = unused_name(f"{maker.name or product.name}_scaled", taken)
        taken.add(name)
        scaled = ir.Node("", node.op_type, [first, number], name=name)
        scaled.outputs[0].name = name
        if first is not None:
            scaled.outputs[0].type, scaled.outputs[0].shape = first.type, first.shape
        graph.insert_before(maker, scaled)
        maker.replace_input_with(0, scaled.outputs[0])
        node.outputs[0].replace_all_uses_with(product)
        graph.remove(node, safe=True)


def _goes_to_softmax(node: ir.Node) -> bool:
    """Whether a softmax reads what comes of ``node``, and no product before; an output of the network is none."""
    waiting, seen = [node.outputs[0]], {node.outputs[0]}
    found = False
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return False
        for reader in value.consumers():
            found = found or reader.op_type == "Softmax"
            if reader.op_type not in ("Softmax", "MatMul", "Gemm", "Conv", "Einsum"):
                waiting += [made for made in reader.outputs if made not in seen]
                seen.update(reader.outputs)
    return found


def _is_product(value: ir.Value | None) -> bool:
    """Whether a value is the product of two tensors that are no constants, and one operation alone reads it."""
    maker = None if value is None else value.producer()
    if value is None or maker is None or maker.op_type != "MatMul" or len(value.uses()) != 1:
        return False
    return value.is_graph_output() is False and all(constant(factor) is None for factor in maker.inputs)


def softmax_before_values(graph: ir.Graph) -> None:
    """Makes the softmax of an attention the first factor, in place; as qat/graph/attention.py does.

    A softmax that is not transposed and products without one stay as they are.
    """
    taken = all_names(graph)
    for product in list(graph):
        if product.op_type != "MatMul" or (turned := _before_swap(product.inputs[1])) is None:
            continue
        values, made, maker = product.inputs[0], product.outputs[0], turned.producer()
        if values is None or values.shape is None or values.shape.rank() < 2 or constant(values) is not None:
            continue
        if maker is None or maker.op_type != "Softmax" or made.shape is None:
            continue
        rows = _before_swap(values) or _Built(values, product, taken).transpose(-2, -1).value
        mixed = _Built(turned, product, taken) @ _Built(rows, product, taken)
        mixed.value.shape, result = _swapped(made.shape), mixed.transpose(-2, -1).value
        _replace(graph, product, result)


def products_of_einsums(graph: ir.Graph) -> None:
    """Makes each Einsum of two tensors that is a batched matrix product one, in place: only products fuse."""
    taken = all_names(graph)
    for node in list(graph):
        if node.op_type != "Einsum" or node.domain or len(node.inputs) != 2:
            continue
        given = [value for value in node.inputs if value is not None and value.shape is not None]
        if len(given) < 2 or any(constant(value) is not None for value in given):
            continue
        factors = [_Built(value, node, taken) for value in given]
        product = product_of_einsum(node.attributes["equation"].as_string(), *factors)
        if product is not None:
            _replace(graph, node, product.value)


def _replace(graph: ir.Graph, node: ir.Node, made: ir.Value) -> None:
    """Makes ``made`` what ``node`` made, by name."""
    old = node.outputs[0]
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    made.name = old.name


def _swapped(shape: ir.Shape) -> ir.Shape:
    *before, rows, columns = shape.dims
    return ir.Shape([*before, columns, rows])


def _before_swap(value: ir.Value | None) -> ir.Value | None:
    """What ``value`` is the transposed matrices of; None if it is of nothing."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose" or value is None or value.shape is None:
        return None
    rank = value.shape.rank()
    swaps = rank > 1 and permutation(node, rank) == [*range(rank - 2), rank - 1, rank - 2]
    return node.inputs[0] if swaps else None


class _Built:
    """A tensor whose products and permutations become nodes in front of ``before``."""

    def __init__(self, value: ir.Value, before: ir.Node, taken: set[str]) -> None:
        self.value, self.before, self.taken = value, before, taken

    def __matmul__(self, other: _Built) -> _Built:
        shape = ir.Shape([*self._shape.dims[:-1], other._shape.dims[-1]])
        return self._made(ir.Node("", "MatMul", [self.value, other.value]), "product", shape)

    def transpose(self, first: int, second: int) -> _Built:
        """Two axes exchanged."""
        order = list(range(self._shape.rank()))
        order[first], order[second] = order[second], order[first]
        return self.permute(order)

    def permute(self, order: Sequence[int]) -> _Built:
        """The axes in another order."""
        node = ir.Node("", "Transpose", [self.value], [ir.AttrInt64s("perm", order)])
        return self._made(node, "transposed", ir.Shape([self._shape.dims[axis] for axis in order]))

    @property
    def _shape(self) -> ir.Shape:
        assert self.value.shape is not None
        return self.value.shape

    def _made(self, node: ir.Node, what: str, shape: ir.Shape) -> _Built:
        name = unused_name(f"{self.before.name or self.before.outputs[0].name}_{what}", self.taken)
        self.taken.add(name)
        node.name, (output,) = name, node.outputs
        output.name, output.shape, output.type = name, shape, self.value.type
        node.metadata_props.update(self.before.metadata_props)
        assert self.before.graph is not None
        self.before.graph.insert_before(self.before, node)
        return _Built(output, self.before, self.taken)
