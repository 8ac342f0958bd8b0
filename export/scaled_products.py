"""Attentions in the form whose factors can be quantized: (s * q) @ k instead of s * (q @ k)."""

from __future__ import annotations

import onnx_ir as ir

from export.names import unused_name
from export.onnx_network import constant


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
