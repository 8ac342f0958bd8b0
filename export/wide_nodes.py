"""Which nodes of a float32 network have to compute in float32 when the rest is stored in half precision, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from export.onnx_network import DEQUANTIZE, QUANTIZE

HalfType = Literal["float16", "bfloat16"]
HALF: Mapping[HalfType, ir.DataType] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
FLOAT = ir.DataType.FLOAT
CARRYING = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Expand")
"""Operators that leave the values of their first input as they are."""
# What sums many squares or exponentials, and exceeds float16 or loses its 11 bits: whole, or as the parts of it,
_WIDE_OPERATORS = (
    *("LayerNormalization", "GroupNormalization", "InstanceNormalization", "LpNormalization", "Softmax", "LogSoftmax"),
)
_BEGINNING = (
    *("Exp", "Log", "Pow", "CumSum", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd"),
    *("ReduceSum", "ReduceSumSquare"),
)
# which end by the mean of squares, a small number that keeps from dividing by 0, the root, the division.
_GUARDING = ("Add", "Clip", "Max")
_ENDING = (*_GUARDING, "ReduceMean", "Sqrt", "Reciprocal", "Div")
_NORMALIZING = ("Mul", "Add", "Sub", "Div", *CARRYING)  # of bytes, before they are quantized
# TensorRT-RTX 1.7 refuses these, or computes them in FP32 all the same (tests/export/test_float_types.py).
_NOT_IN_BFLOAT16 = ("HardSwish", "Mish", "MaxPool", "AveragePool")
_ROOM = 4
"""A type must hold so many times the largest magnitude that was measured."""
_BYTES = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.BOOL)


def dequantizer_behind(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes ``value``, if at most ``CARRYING`` operators stand between."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in CARRYING and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == DEQUANTIZE else None


def may_be_half(node: ir.Node, index: int, kind: HalfType, opset: int) -> bool:
    """Whether the schema of the node's operator lets an input, which is float, be of half precision."""
    schema = onnx.defs.get_schema(node.op_type, opset)
    formal = schema.inputs[min(index, len(schema.inputs) - 1)]
    allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    return f"tensor({HALF[kind].name.lower()})" in allowed.get(formal.type_str, ())


def largest_of(array: np.ndarray) -> float:
    """The largest magnitude that is finite; an infinity stays one in every type."""
    return float(np.abs(array[np.isfinite(array)]).max(initial=0))


class WideNodes:
    """Decides for every node of a graph in order; ``reasons`` has those that compute in float32.

    Args:
        graph: all its floats are float32.
        kind: what the others compute in.
        opset: the version of the operators.
        largest: the largest magnitude of tensors by name, as measured; those that are not named are taken to be small.
    """

    def __init__(self, graph: ir.Graph, kind: HalfType, opset: int, largest: Mapping[str, float]) -> None:
        self._kind, self._opset, self._largest = kind, opset, largest
        limits = ml_dtypes.finfo(HALF[kind].numpy())  # type: ignore[no-untyped-call]
        self._highest, self._lowest = float(limits.max) / _ROOM, float(limits.tiny)
        self._ending: set[ir.Node] = set()
        self._bytes: set[ir.Node] = set()
        self.reasons: dict[ir.Node, str] = {}
        for node in graph:
            if node.op_type not in (QUANTIZE, DEQUANTIZE) and (reason := self._why(node)):
                self.reasons[node] = reason

    def is_small(self, scale: ir.Value | None) -> bool:
        """Whether a scale is below the normal numbers of half precision."""
        values = None if scale is None else scale.const_value
        return values is not None and bool((values.numpy() < self._lowest).any())

    def _why(self, node: ir.Node) -> str:
        floats = [value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype == FLOAT]
        if not floats:
            return ""
        return self._by_operator(node) or self._by_neighbours(node) or self._by_values(node, floats)

    def _by_operator(self, node: ir.Node) -> str:
        if node.domain not in ("", "ai.onnx"):
            return f"{node.op_type} is not known to compute in half precision"
        if self._kind == "bfloat16" and node.op_type in _NOT_IN_BFLOAT16:
            return f"TensorRT has no {node.op_type} in bfloat16"
        if node.op_type in _BEGINNING:
            self._ending.add(node)
        if node.op_type in (*_WIDE_OPERATORS, *_BEGINNING):
            return f"{node.op_type} needs the range of float32"
        given = node.inputs[0] if node.inputs else None
        if node.op_type == "Cast" and given is not None and given.dtype != FLOAT:
            if given.dtype not in _BYTES:
                return "integers may be larger than half precision holds exactly"
            if given.dtype == ir.DataType.UINT8:
                self._bytes.add(node)
                return "bytes are normalized in float32"
            return ""
        inputs = [index for index, value in enumerate(node.inputs) if value is not None and value.dtype == FLOAT]
        if not any(may_be_half(node, index, self._kind, self._opset) for index in inputs):
            return f"{node.op_type} takes float32 only" if inputs else "made in float32"
        return ""

    def _by_neighbours(self, node: ir.Node) -> str:
        """Because of the node before, whose computation it ends, or because of a small scale."""
        before = {made for value in node.inputs if value is not None and (made := value.producer()) is not None}
        if node.op_type in _NORMALIZING and before & self._bytes:
            self._bytes.add(node)
            return "bytes are normalized in float32"
        if node.op_type in (*_ENDING, *CARRYING) and before & self._ending:
            self._ending.add(node)
            return "it ends what an operator before it computes in float32"
        behind = [made for value in node.inputs if (made := dequantizer_behind(value)) is not None]
        ahead = [usage.node for value in node.outputs for usage in value.uses() if usage.node.op_type == QUANTIZE]
        # What only moves values takes the type of who reads it.
        quantizing = ahead if node.op_type in CARRYING else [*behind, *ahead]
        if small := [one for one in quantizing if self.is_small(one.inputs[1])]:
            return f"the scale of {small[0].name} is below {self._lowest:.1e}"
        return ""

    def _by_values(self, node: ir.Node, floats: list[ir.Value]) -> str:
        for value in floats:
            if value.const_value is None:
                largest = self._largest.get(value.name or "", 0.0)
            else:
                largest = largest_of(value.const_value.numpy())
                if 0 < largest < self._lowest:
                    if node.op_type in _GUARDING:
                        self._ending.add(node)
                    return f"{value.name} is {largest:.1e}, which half precision does not hold"
            if largest > self._highest:
                return f"{value.name} reaches {largest:.3g}"
        return ""
