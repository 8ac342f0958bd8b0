"""Takes the number that an INT8 layer's output is multiplied by, as q in an attention, into its scales and bias.

On the way from the layer to the next Q stand then only operations that move data, and the layer's kernel writes codes.
Otherwise it writes float32, and another kernel multiplies, quantizes and moves: so did TensorRT 8.6 on an H200, by the
names of its kernels. The codes of the weight stay the same. Answers do, too, if the number is a power of two, as 1/8
for heads of 64 channels; else scales and bias are rounded to float32 once more.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from export.names import all_names, unused_name
from export.onnx_network import DEQUANTIZE, QUANTIZE, WEIGHT, constant

_MOVERS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")


def fold_factors(model: ir.Model, smallest: float = 0.0) -> int:
    """Does so in a network with Q/DQ nodes, in place, unless a scale became less than ``smallest``.

    Returns how many numbers it took in.
    """
    graph, folded = model.graph, 0
    for node in list(graph):
        source, factor = _factor(node)
        if source is None or not all(reader.op_type == QUANTIZE for reader in node.outputs[0].consumers()):
            continue
        if _fold(graph, source, factor, smallest):
            node.outputs[0].replace_all_uses_with(source)
            graph.remove(node, safe=True)
            folded += 1
    if folded:
        passes.RemoveUnusedNodesPass()(model)  # the numbers, scales and biases as they were
    return folded


def _factor(node: ir.Node) -> tuple[ir.Value | None, float]:
    """What ``node`` multiplies by a positive number, and that number; None if it does something else."""
    if node.op_type not in ("Mul", "Div") or node.outputs[0].is_graph_output():
        return None, 1.0
    at = 0 if node.op_type == "Mul" and constant(node.inputs[0]) is not None else 1
    values = constant(node.inputs[at])
    if values is None or values.size != 1 or not 0 < float(values.item()) < np.inf:
        return None, 1.0
    number = float(values.item())
    return node.inputs[1 - at], number if node.op_type == "Mul" else 1 / number


def _fold(graph: ir.Graph, output: ir.Value, factor: float, smallest: float) -> bool:
    """Multiplies what ``output`` is a moved copy of, the output of an INT8 layer; False if it is something else."""
    value: ir.Value | None = output
    bias: tuple[ir.Node, int] | None = None
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None:
            return False
        if node.op_type in ("MatMul", "Gemm"):
            return _scale_layer(graph, node, bias, factor, smallest)
        added = _bias_of(node) if node.op_type == "Add" and bias is None else None
        if added is None and node.op_type not in _MOVERS:
            return False
        bias = bias if added is None else (node, added)
        value = node.inputs[0 if added is None else 1 - added]
    return False


def _bias_of(node: ir.Node) -> int | None:
    """Which input of an addition is a vector of constants."""
    values = (constant(value) for value in node.inputs)
    return next((at for at, found in enumerate(values) if found is not None and found.ndim == 1), None)


def _scale_layer(
    graph: ir.Graph, layer: ir.Node, bias: tuple[ir.Node, int] | None, factor: float, smallest: float
) -> bool:
    dequantize = _only_producer(layer.inputs[WEIGHT])
    if dequantize is not None and dequantize.op_type == "Transpose":
        dequantize = _only_producer(dequantize.inputs[0])
    if dequantize is None or dequantize.op_type != DEQUANTIZE or constant(dequantize.inputs[0]) is None:
        return False
    if layer.op_type == "Gemm":
        if any(layer.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
            return False
        if len(layer.inputs) > 2 and bias is None:
            bias = (layer, 2)
        elif len(layer.inputs) > 2:
            return False
    multiplied = [(dequantize, 1), *([bias] if bias else [])]
    scale, *others = (constant(node.inputs[at]) for node, at in multiplied)
    if scale is None or any(found is None for found in others):
        return False
    as_stored = scale.dtype.type  # NumPy 1 would compute and compare one number in float64, NumPy 2 does not
    if (scale * as_stored(factor)).min() < as_stored(smallest):
        return False
    for node, at in multiplied:
        _multiply(graph, node, at, factor)
    return True


def _only_producer(value: ir.Value | None) -> ir.Node | None:
    """What makes a value that nothing else reads."""
    return None if value is None or len(value.uses()) > 1 else value.producer()


def _multiply(graph: ir.Graph, node: ir.Node, at: int, factor: float) -> None:
    """Gives input ``at`` of ``node``, a constant that others may read too, multiplied by ``factor``."""
    given = node.inputs[at]
    values = constant(given)
    assert given is not None
    assert values is not None
    name = unused_name(f"{given.name}.scaled", all_names(graph))
    stored = ir.Value(name=name, const_value=ir.tensor((values * factor).astype(values.dtype), name=name))
    stored.type, stored.shape = given.type, given.shape
    graph.register_initializer(stored)
    node.replace_input_with(at, stored)
