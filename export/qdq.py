"""What the hard rules ask about Q and DQ nodes, their constants, and who reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from export.onnx_network import DEQUANTIZE, QUANTIZE, WEIGHT, WEIGHTED, constant, constants, permutation
from qat.base.number_format import NumberFormat
from qat.graph.operations import COMMUTING, kind_of_onnx

Q_DQ = (QUANTIZE, DEQUANTIZE)
DATA, SCALE, ZERO_POINT = 0, 1, 2
"""The inputs of Q and DQ nodes."""
BIAS = 2
HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_INTEGER_OPERATORS = (
    *("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"),
    *("DynamicQuantizeLinear", "QGemm", "QAttention", "QEmbedLayerNormalization"),
)


@dataclass(frozen=True)
class QdqModel:
    """What the rules ask about a whole model.

    Attributes:
        opset: the version of the default operator set.
        nodes: all nodes, with those of subgraphs.
        constants: the values that are computed from initializers and Constant nodes only.
        format: the number format that codes must have.
    """

    opset: int
    nodes: tuple[ir.Node, ...]
    constants: set[ir.Value]
    format: NumberFormat

    @classmethod
    def from_ir(cls, model: ir.Model, number_format: NumberFormat) -> QdqModel:
        """Reads ``model``; its codes must be of ``number_format``."""
        opset = model.opset_imports.get("", 0)
        return cls(opset, tuple(model.graph.all_nodes()), constants(model.graph), number_format)

    @property
    def codes(self) -> ir.DataType:
        """The ONNX type that codes must have."""
        return ir.DataType[self.format.onnx_type]

    @cached_property
    def nodes_with_several_scales(self) -> list[ir.Node]:
        """The Q and DQ nodes with a scale for each channel."""
        return [node for node in self.nodes if node.op_type in Q_DQ and size_of(self.value(node.inputs[SCALE])) > 1]

    @cached_property
    def nodes_with_half_scales(self) -> list[ir.Node]:
        """The Q and DQ nodes with scales of 16 bits."""
        return [node for node in self.nodes if node.op_type in Q_DQ and self.dtype(node.inputs[SCALE]) in HALF_TYPES]

    def value(self, value: ir.Value | None) -> np.ndarray | None:
        """The value of what is computed from constants only, by whatever operators; None of anything else."""
        if value is None or value not in self.constants:
            return None
        known, node = constant(value), value.producer()
        if known is not None or node is None:
            return known
        given = {source.name or "": self.value(source) for source in node.inputs if source is not None}
        try:
            evaluated: Any = ReferenceEvaluator(ir.to_proto(node)).run(None, given)
        except Exception:  # the reference evaluator lacks an operator: nothing is known of the value
            return None
        return np.asarray(evaluated[node.outputs.index(value)])

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The type of a tensor; what DequantizeLinear makes has the type of its scale."""
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
    """What findings call a node."""
    return node.name or node.outputs[0].name or node.op_type


def input_of(node: ir.Node, position: int) -> ir.Value | None:
    """The input at ``position``; None if the node has no input there."""
    return node.inputs[position] if len(node.inputs) > position else None


def size_of(array: np.ndarray | None) -> int:
    """The number of elements of an array; 0 for None."""
    return 0 if array is None else array.size


def is_integer_operator(node: ir.Node) -> bool:
    """Whether a node is an operator on integers, which TensorRT does not have."""
    return node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OPERATORS


def is_made_by_integer_operator(value: ir.Value | None) -> bool:
    """Whether an integer operator made ``value``."""
    maker = value.producer() if value is not None else None
    return maker is not None and is_integer_operator(maker)


def axis_of(node: ir.Node, data: ir.Value) -> int:
    """The axis of a Q's or DQ's scales, counted from the front."""
    axis = node.attributes.get_int("axis", 1)
    return axis + data.shape.rank() if axis < 0 and data.shape is not None else axis


def is_checked_at_quantizer(node: ir.Node, position: int) -> bool:
    """Whether ``node`` is a DQ that reads the same scale or zero point as the Q before it: rules ask about it there."""
    data = node.inputs[DATA]
    maker = data.producer() if data is not None and node.op_type == DEQUANTIZE else None
    return maker is not None and maker.op_type == QUANTIZE and input_of(maker, position) is input_of(node, position)


def code_type(model: QdqModel, node: ir.Node) -> ir.DataType | None:
    """The type of the codes that a Q makes or a DQ reads; None if it is not known, or if a Q before the DQ has it."""
    zero_point, data = model.dtype(input_of(node, ZERO_POINT)), node.inputs[DATA]
    if node.op_type == QUANTIZE:
        stated = node.attributes.get_int("output_dtype", 0)
        return zero_point or (ir.DataType(stated) if stated else None)
    maker = data.producer() if data is not None else None
    if maker is not None and (maker.op_type == QUANTIZE or is_integer_operator(maker)):
        return None
    return model.dtype(data) or zero_point


def weight_readers(value: ir.Value, axis: int) -> Iterator[tuple[ir.Node, int]]:
    """The layers that read a constant as their weight, also behind a Transpose, and which axis ``axis`` is there."""
    for reader, position in value.uses():
        if reader.op_type in WEIGHTED and position == WEIGHT:
            yield reader, axis
        elif reader.op_type == "Transpose" and value.shape is not None:
            yield from weight_readers(reader.outputs[0], permutation(reader, value.shape.rank()).index(axis))
        elif reader.op_type in ("Identity", "Cast"):
            yield from weight_readers(reader.outputs[0], axis)


def quantizes_weight(quantize: ir.Node) -> bool:
    """Whether a layer reads, as its weight, what a Q makes and a DQ dequantizes."""
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
    """The nodes that compute on codes, and whether a DequantizeLinear or the caller gets the codes.

    Data movement passes codes on.
    """
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
