"""What the hard rules ask about Q and DQ nodes, their constants, and who reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from export.onnx_network import DEQUANTIZE, QUANTIZE, WEIGHT, WEIGHTED, constant, permutation
from qat.graph.operations import COMMUTING, kind_of_onnx

Q_DQ = (QUANTIZE, DEQUANTIZE)
DATA, SCALE, ZERO_POINT = 0, 1, 2
"""The inputs of Q and DQ nodes."""
BIAS = 2
_INTEGER_OPERATORS = (
    *("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"),
    *("DynamicQuantizeLinear", "QGemm", "QAttention", "QEmbedLayerNormalization"),
)


@dataclass(frozen=True)
class QdqModel:
    """What the rules ask about a whole model."""

    opset: int
    constants: set[ir.Value]

    def value(self, value: ir.Value | None) -> np.ndarray | None:
        """What is computed from constants alone, by whatever operators; None of anything else."""
        if value is None or value not in self.constants:
            return None
        known, node = constant(value), value.producer()
        if known is not None or node is None:
            return known
        given = {source.name or "": self.value(source) for source in node.inputs if source is not None}
        try:
            evaluated: Any = ReferenceEvaluator(ir.to_proto(node)).run(None, given)
        except Exception:  # an operator that the reference evaluator lacks: nothing is known of the value
            return None
        return np.asarray(evaluated[node.outputs.index(value)])

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The type of a tensor; what DequantizeLinear makes is of the type of its scale."""
        if value is None:
            return None
        node = value.producer()
        if node is not None and node.op_type == DEQUANTIZE and "output_dtype" not in node.attributes:
            return self.dtype(node.inputs[SCALE])
        if value.dtype is not None:
            return value.dtype
        array = self.value(value)
        return None if array is None else ir.DataType.from_numpy(array.dtype)


def name_of(node: ir.Node) -> str:
    """What a node is called in findings."""
    return node.name or node.outputs[0].name or node.op_type


def input_of(node: ir.Node, position: int) -> ir.Value | None:
    """The input at ``position``; None where the node has none there."""
    return node.inputs[position] if len(node.inputs) > position else None


def size_of(array: np.ndarray | None) -> int:
    """Elements of an array, 0 of none."""
    return 0 if array is None else array.size


def is_integer_operator(node: ir.Node) -> bool:
    """Whether it computes on integers, which TensorRT does not."""
    return node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OPERATORS


def made_by_integer_operator(value: ir.Value | None) -> bool:
    """Whether an integer operator made ``value``."""
    maker = value.producer() if value is not None else None
    return maker is not None and is_integer_operator(maker)


def axis_of(node: ir.Node, data: ir.Value) -> int:
    """The axis of a Q's or DQ's scales, counted from the front."""
    axis = node.attributes.get_int("axis", 1)
    return axis + data.shape.rank() if axis < 0 and data.shape is not None else axis


def as_its_quantizer(node: ir.Node, position: int) -> bool:
    """Whether a DQ reads the scale or zero point of the Q before it, where the rules ask about it already."""
    data = node.inputs[DATA]
    maker = data.producer() if data is not None and node.op_type == DEQUANTIZE else None
    return maker is not None and maker.op_type == QUANTIZE and input_of(maker, position) is input_of(node, position)


def code_type(graph: QdqModel, node: ir.Node) -> ir.DataType | None:
    """The type of the codes that a Q makes or a DQ reads; None where unknown, or where the Q before it tells."""
    zero_point, data = graph.dtype(input_of(node, ZERO_POINT)), node.inputs[DATA]
    if node.op_type == QUANTIZE:
        stated = node.attributes.get_int("output_dtype", 0)
        return zero_point or (ir.DataType(stated) if stated else None)
    maker = data.producer() if data is not None else None
    if maker is not None and (maker.op_type == QUANTIZE or is_integer_operator(maker)):
        return None
    return graph.dtype(data) or zero_point


def weight_readers(value: ir.Value, axis: int) -> Iterator[tuple[ir.Node, int]]:
    """The layers that read a constant as their weight, behind Transpose too, and what ``axis`` is there."""
    for reader, position in value.uses():
        if reader.op_type in WEIGHTED and position == WEIGHT:
            yield reader, axis
        elif reader.op_type == "Transpose" and value.shape is not None:
            yield from weight_readers(reader.outputs[0], permutation(reader, value.shape.rank()).index(axis))
        elif reader.op_type in ("Identity", "Cast"):
            yield from weight_readers(reader.outputs[0], axis)


def quantizes_weight(quantize: ir.Node) -> bool:
    """Whether what a Q makes is, dequantized, a layer's weight."""
    readers = quantize.outputs[0].consumers()
    return any(any(weight_readers(value, 0)) for reader in readers for value in reader.outputs)


def output_axis(layer: ir.Node) -> int:
    """The axis of the output channels in a layer's weight."""
    if layer.op_type == "Conv" or (layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) == 1):
        return 0
    weight = layer.inputs[WEIGHT]
    if layer.op_type == "MatMul" and weight is not None and weight.shape is not None:
        return weight.shape.rank() - 1
    return 1


def code_readers(codes: ir.Value) -> tuple[list[ir.Node], bool]:
    """Who computes on codes, and whether a DequantizeLinear or the caller gets them; data movement passes them on."""
    odd, found = [], codes.is_graph_output()
    for reader in codes.consumers():
        if reader.op_type == DEQUANTIZE:
            found = True
        elif kind_of_onnx(reader.op_type, {}) in COMMUTING:
            behind = [code_readers(value) for value in reader.outputs]
            odd += [node for nodes, _ in behind for node in nodes]
            found = found or any(there for _, there in behind)
        elif is_integer_operator(reader):
            found = True  # see forbidden_op
        else:
            odd.append(reader)
    return odd, found
