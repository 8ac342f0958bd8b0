"""Writes a placement into a float ONNX graph: Q/DQ nodes around activations, codes for weights. Needs no torch.

The Q and DQ nodes of all tensors that share a scale share its initializers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from export.names import all_names, unused_name
from export.onnx_network import DEQUANTIZE, QUANTIZE, WEIGHT, OnnxNetwork
from export.qdq import output_axis
from qat.base.number_format import NumberFormat
from qat.rules.placement import Placement


@dataclass(frozen=True, eq=False)
class WeightCodes:
    """A weight: int8 ``codes`` of its shape; float32 ``scale`` [C] along ``axis``, or [] of all of it."""

    codes: np.ndarray
    scale: np.ndarray
    axis: int | None = None

    def along(self, axis: int) -> WeightCodes:
        """With one scale stated for each index of ``axis``, as TensorRT wants it of a transposed convolution."""
        if self.scale.ndim:
            return self
        return WeightCodes(self.codes, np.full(self.codes.shape[axis], self.scale), axis)


def insert(
    model: ir.Model,
    view: OnnxNetwork,
    placement: Placement,
    scales: Mapping[str, float],
    number_format: NumberFormat,
    codes_of: Callable[[ir.Value, int | None], WeightCodes],
) -> None:
    """Quantizes ``model`` in place.

    Args:
        model: a float network.
        view: what ``network_from_onnx`` read of it.
        placement: what qat.rules.place.place decided about ``view.network``.
        scales: the scale of each quantizer of ``placement``, by its name: > 0, in the unit of its tensor. It is written
            as float32, so that one that is a float32 already keeps all its bits.
        number_format: the format of activations. Weights use it without its lowest code.
        codes_of: the codes of a weight whose scales lie along an axis; of one with one scale if it is None.
    """
    values = {value.name: value for value in (*model.graph.inputs, *_outputs(model.graph))}
    writer = _Writer(model.graph)
    stored = {
        name: _store_scale(writer, name, scales[name], number_format)
        for name in dict.fromkeys(tensor.quantizer for tensor in placement.tensors)
    }
    for tensor in placement.tensors:
        value = values[tensor.tensor]
        dequantized = _add_pair(writer, value, *stored[tensor.quantizer], number_format)
        for read in tensor.reads:
            for node in view.all_nodes(read.reader):
                _reroute(node, value, dequantized)
    weights: dict[tuple[str, int | None], ir.Value] = {}  # a weight may serve several layers
    for decision in placement.weights:
        if decision.quantized:
            node = view.nodes[decision.op]
            weight, axis = node.inputs[WEIGHT], None if node.op_type == "ConvTranspose" else output_axis(node)
            assert weight is not None
            key = (weight.name or "", axis)
            if key not in weights:
                codes = codes_of(weight, axis)
                stated = codes.along(output_axis(node)) if axis is None else codes
                weights[key] = _add_weight(writer, weight, stated, number_format)
            node.replace_input_with(WEIGHT, weights[key])
    model.graph.sort()
    passes.RemoveUnusedNodesPass()(model)  # the float weights, too


def _outputs(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs]


class _Writer:
    """Adds nodes and initializers to a graph, under names that nothing in it has."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._taken = graph, all_names(graph)

    def node(
        self, operator: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, like: ir.Value, **attributes: int
    ) -> ir.Value:
        """The output of a new node, which has its name, and the shape of ``like``. Nodes are sorted at the end."""
        given = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        node = ir.Node("", operator, inputs, given, name=self._unused(name))
        output = node.outputs[0]
        output.name, output.type, output.shape = node.name, ir.TensorType(dtype), like.shape
        self._graph.append(node)
        return output

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """A new constant."""
        unique = self._unused(name)
        value = ir.Value(name=unique, const_value=ir.tensor(array, name=unique))
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
        self._graph.register_initializer(value)
        return value

    def _unused(self, name: str) -> str:
        unique = unused_name(name, self._taken)
        self._taken.add(unique)
        return unique


def _store_scale(writer: _Writer, name: str, scale: float, number_format: NumberFormat) -> tuple[ir.Value, ir.Value]:
    """Initializers of the scale and of its zero point."""
    zero_point = np.zeros((), number_format.dtype)
    return (
        writer.initializer(f"{name}.scale", np.array(scale, np.float32)),
        writer.initializer(f"{name}.zero_point", zero_point),
    )


def _add_pair(
    writer: _Writer, value: ir.Value, scale: ir.Value, zero_point: ir.Value, number_format: NumberFormat
) -> ir.Value:
    """``value`` through QuantizeLinear and DequantizeLinear."""
    codes_type = ir.DataType[number_format.onnx_type]
    codes = writer.node(QUANTIZE, [value, scale, zero_point], f"{value.name}/quantize", codes_type, value)
    return writer.node(DEQUANTIZE, [codes, scale, zero_point], f"{value.name}/dequantize", ir.DataType.FLOAT, value)


def _add_weight(writer: _Writer, weight: ir.Value, quantized: WeightCodes, number_format: NumberFormat) -> ir.Value:
    """``weight`` as codes behind DequantizeLinear."""
    name = weight.name or ""
    constants = [
        writer.initializer(f"{name}.codes", quantized.codes.astype(number_format.dtype)),
        writer.initializer(f"{name}.scale", quantized.scale.astype(np.float32)),
        writer.initializer(f"{name}.zero_point", np.zeros(quantized.scale.shape, number_format.dtype)),
    ]
    along = {} if quantized.axis is None else {"axis": quantized.axis}
    return writer.node(DEQUANTIZE, constants, f"{name}/dequantize", ir.DataType.FLOAT, weight, **along)


def _reroute(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for index, value in enumerate(node.inputs):
        if value is old:
            node.replace_input_with(index, new)
