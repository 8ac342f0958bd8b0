"""Writes a placement into a float ONNX graph: Q/DQ nodes around activations, INT8 codes for weights.

Numerics are those of qat/fake_quantize/quantizer.py. Q and DQ of all tensors that share a scale share its initializers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch

from export.names import unused_name
from export.onnx_network import DEQUANTIZE, QUANTIZE, WEIGHT, OnnxNetwork
from export.qdq import output_axis
from qat.fake_quantize import quantizer
from qat.fake_quantize.quantizer import SCALE_FLOOR, per_channel, quantize, scale_from_amax, weight_amax
from qat.rules.placement import Placement


def insert(
    model: ir.Model,
    view: OnnxNetwork,
    placement: Placement,
    amax: Mapping[str, float],
) -> int:
    """Quantizes ``model`` in place.

    Args:
        model: a float network.
        view: what ``network_from_onnx`` read of it.
        placement: what qat.rules.place.place decided about ``view.network``.
        amax: the largest magnitude by the name of each quantizer of ``placement``.

    Returns:
        How many weight channels are zero; their scales were floored.
    """
    values = {value.name: value for value in (*model.graph.inputs, *_outputs(model.graph))}
    scales = {name: _scale(model.graph, name, amax[name]) for name in {t.quantizer for t in placement.tensors}}
    for tensor in placement.tensors:
        value = values[tensor.tensor]
        dequantized = _pair(model.graph, value, *scales[tensor.quantizer])
        for read in tensor.reads:
            _reroute(view.nodes[read.reader], value, dequantized)
    dead = 0
    stored: dict[tuple[str, int], ir.Value] = {}  # a weight may serve several layers
    for decision in placement.weights:
        if decision.quantized:
            node = view.nodes[decision.op]
            weight, axis = node.inputs[WEIGHT], output_axis(node)
            assert weight is not None
            key = (weight.name or "", axis)
            if key not in stored:
                stored[key], zeros = _quantized_weight(model.graph, weight, axis)
                dead += zeros
            node.replace_input_with(WEIGHT, stored[key])
    model.graph.sort()
    passes.RemoveUnusedNodesPass()(model)  # the float weights, too
    return dead


def _outputs(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs]


def _scale(graph: ir.Graph, name: str, amax: float) -> tuple[ir.Value, ir.Value]:
    scale = scale_from_amax(torch.tensor(amax)).numpy()
    return _initializer(graph, f"{name}.scale", scale), _initializer(graph, f"{name}.zero_point", np.zeros((), np.int8))


def _pair(graph: ir.Graph, value: ir.Value, scale: ir.Value, zero_point: ir.Value) -> ir.Value:
    """``value`` through QuantizeLinear and DequantizeLinear."""
    codes = _append(graph, QUANTIZE, [value, scale, zero_point], f"{value.name}/quantize", ir.DataType.INT8, value)
    return _append(graph, DEQUANTIZE, [codes, scale, zero_point], f"{value.name}/dequantize", ir.DataType.FLOAT, value)


def _quantized_weight(graph: ir.Graph, weight: ir.Value, axis: int) -> tuple[ir.Value, int]:
    """``weight`` as INT8 codes behind DequantizeLinear; how many of its channels are zero."""
    assert weight.const_value is not None
    given = torch.from_numpy(np.array(weight.const_value.numpy(), np.float32))
    scale = scale_from_amax(weight_amax(given, axis))
    codes = quantize(given, per_channel(scale, given.ndim, axis), quantizer.WEIGHT)
    name = weight.name or ""
    constants = [
        _initializer(graph, f"{name}.codes", codes.to(torch.int8).numpy()),
        _initializer(graph, f"{name}.scale", scale.numpy()),
        _initializer(graph, f"{name}.zero_point", np.zeros(len(scale), np.int8)),
    ]
    dequantized = _append(graph, DEQUANTIZE, constants, f"{name}/dequantize", ir.DataType.FLOAT, weight, axis=axis)
    return dequantized, int((scale <= SCALE_FLOOR).sum())


def _reroute(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    for index, value in enumerate(node.inputs):
        if value is old:
            node.replace_input_with(index, new)


def _append(
    graph: ir.Graph,
    operator: str,
    inputs: list[ir.Value],
    name: str,
    dtype: ir.DataType,
    like: ir.Value,
    **attributes: Any,
) -> ir.Value:
    node = ir.Node("", operator, inputs, [ir.AttrInt64(key, value) for key, value in attributes.items()], name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(dtype), like.shape
    graph.append(node)  # sorted at the end
    return output


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    unique = unused_name(name, graph.initializers)
    value = ir.Value(name=unique, const_value=ir.tensor(array, name=unique))
    value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value
