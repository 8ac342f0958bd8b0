"""Takes numbers that tensors are multiplied by into the scales and biases of INT8 layers, where codes stay the same.

TensorRT's point-wise kernels take codes in, but not next to a constant: with one they read and write FP16, and
conversions stand around them. There are three ways to do without:

1. A layer's output is multiplied before its Q, as q in an attention: the layer's scales and bias take the number. Then
   its kernel writes codes. Otherwise it writes float32, and another kernel multiplies, quantizes and moves: so did
   TensorRT 8.6 on an H200, by the names of its kernels.
2. Anything else before a Q, as a swish: the Q and its DQ get the scale of what is not multiplied, and the weights
   behind take the number.
3. A gate's product, as at the end of the blocks of an NFNet: the layer that makes one factor takes the number, or the
   smaller factor is multiplied.

timm's nfnet_l0 has 12 numbers of the second kind and 24 of the third. With them left where they were it took 2.581 ms
in INT8, 1.912 in FP16, and a third of the time of its kernels was conversions (H200, TensorRT 8.6.0, batch 32,
2026-12-01). Answers stay the same, too, if the number is a power of two, as 1/8 for heads of 64 channels; else scales
and bias are rounded to float32 once more.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from export.composed_activations import composed_activations
from export.names import all_names, unused_name
from export.onnx_network import DEQUANTIZE, QUANTIZE, constant, constants
from export.scaling import Scaling


def fold_factors(model: ir.Model, smallest: float = 0.0) -> int:
    """Does so in a network with Q/DQ nodes, in place, unless a scale became less than ``smallest``.

    Returns how many numbers it took in.
    """
    graph, folded = model.graph, 0
    inner = {node for one in composed_activations(graph, constants(graph)) for node in one.nodes}  # 1/2 of a GELU
    for node in list(graph):
        source, factor = _factor(node)
        if source is not None and node not in inner and _fold(graph, node, source, factor, smallest):
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


def _fold(graph: ir.Graph, node: ir.Node, source: ir.Value, factor: float, smallest: float) -> bool:
    """The first of the three ways that is open."""
    if all(reader.op_type == QUANTIZE for reader in node.outputs[0].consumers()):
        before, behind = Scaling(), Scaling()
        if not _is_added(node, source) and before.make(source, factor, node) and before.apply(graph, smallest):
            return True
        if behind.take_back(node.outputs[0], factor) and behind.apply(graph, smallest):
            return True
    product = source.producer()
    if product is None or product.op_type != "Mul" or len(source.uses()) > 1 or source.is_graph_output():
        return False
    codes = [value for value in product.inputs if _dequantizes(value)]
    if len(set(codes)) < 2:
        return False
    for value in codes:
        scaling = Scaling()
        if scaling.make(value, factor, product) and scaling.apply(graph, smallest):
            return True
    return _multiply(graph, min(codes, key=_elements), product, factor, smallest)


def _is_added(node: ir.Node, source: ir.Value) -> bool:
    """Whether codes of a convolution's multiplied result are added to something.

    Without the number the sum would fuse into the convolution, and these codes would stand between them.
    """
    made = source.producer()
    if made is None or made.op_type != "Conv":
        return False
    codes = [dequantize for quantize in node.outputs[0].consumers() for dequantize in quantize.outputs[0].consumers()]
    return any(reader.op_type == "Add" for one in codes for reader in one.outputs[0].consumers())


def _dequantizes(value: ir.Value | None) -> bool:
    """Whether a DQ makes ``value`` of codes that a Q makes."""
    made = value.producer() if value is not None else None
    codes = made.inputs[0] if made is not None and made.op_type == DEQUANTIZE else None
    quantize = codes.producer() if codes is not None else None
    return quantize is not None and quantize.op_type == QUANTIZE


def _elements(value: ir.Value | None) -> float:
    """Its size for one image; infinite where that is not known."""
    if value is None or value.shape is None:
        return math.inf
    return math.prod(extent if isinstance(extent, int) else math.inf for extent in list(value.shape)[1:])


def _multiply(graph: ir.Graph, value: ir.Value | None, product: ir.Node, factor: float, smallest: float) -> bool:
    """Multiplies one factor of ``product`` in front of its Q, if it is known to be less than what the product makes."""
    if value is None or _elements(value) >= _elements(product.outputs[0]):
        return False
    dequantize = value.producer()
    quantize = dequantize.inputs[0].producer() if dequantize is not None and dequantize.inputs[0] is not None else None
    if dequantize is None or quantize is None:
        return False
    if len(value.uses()) > 1 or len(quantize.outputs[0].uses()) > 1:
        return False
    scaling = Scaling()
    done = scaling.multiply(quantize, 1, factor) and scaling.multiply(dequantize, 1, factor)
    if not done or not scaling.apply(graph, smallest):
        return False
    given = quantize.inputs[0]
    names = all_names(graph)
    name = unused_name(f"{quantize.name}/factor", names)
    number = ir.Value(name=name, const_value=ir.tensor(np.asarray(factor, np.float32), name=name))
    number.type, number.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.register_initializer(number)
    made = unused_name(f"{quantize.name}/multiply", names | {name})
    multiply = ir.node("Mul", [given, number], name=made)
    multiply.outputs[0].name = made
    if given is not None:
        multiply.outputs[0].type, multiply.outputs[0].shape = given.type, given.shape
    graph.insert_before(quantize, multiply)
    quantize.replace_input_with(0, multiply.outputs[0])
    return True
