"""INT8 weights -> float weights in front of a QuantizeLinear: the same codes, for tools that refuse INT8 constants.

TensorRT 8.6.0 does where it merges convolutions of one input into one (inception blocks), and where it hands a part of
the network to another compiler (a cast of uint8 input); seen on an H200. deploy uses this too, so it needs no torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.names import unused_name


def with_float_weights(path: Path) -> bytes:
    """The content of an ONNX file as ``float_weights`` changes it."""
    model = onnx.load(path)
    float_weights(model)
    return bytes(model.SerializeToString())


def float_weights(model: onnx.ModelProto) -> None:
    """Does so, in place, for every INT8 constant that a DequantizeLinear reads; nodes keep their names.

    The codes stay the same: w = code * scale and w / scale are each off by at most a relative 2^-24, and 127 * 2^-23 is
    far from the half that would round to another code.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    quantizers: dict[tuple[str, ...], NodeProto] = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or not {*node.input[:2]} <= constants.keys():
            continue
        if constants[node.input[0]].data_type == TensorProto.INT8:
            key = tuple(node.input)
            if key not in quantizers:  # a weight may serve several layers
                quantizers[key] = _quantizer(graph, node, *(numpy_helper.to_array(constants[name]) for name in key[:2]))
            node.input[0] = quantizers[key].output[0]
    nodes = [*quantizers.values(), *graph.node]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)


def _quantizer(graph: onnx.GraphProto, dequantizer: NodeProto, codes: np.ndarray, scale: np.ndarray) -> NodeProto:
    """What makes ``codes`` of a new float constant of ``graph``, for ``dequantizer`` to read."""
    (axis,) = [attribute.i for attribute in dequantizer.attribute if attribute.name == "axis"] or [1]
    channels = [-1 if index == axis % codes.ndim else 1 for index in range(codes.ndim)] if scale.ndim else []
    taken = {tensor.name for tensor in graph.initializer} | {node.name for node in graph.node}

    def constant(name: str, values: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(values, unused_name(name, taken)))
        return graph.initializer[-1].name

    name = dequantizer.input[0]
    weight = constant(f"{name}.float", codes.astype(scale.dtype) * scale.reshape(channels))
    zero_point = (
        dequantizer.input[2] if len(dequantizer.input) > 2 else constant(f"{name}.zero", scale.astype(np.int8) * 0)
    )
    inputs = [weight, dequantizer.input[1], zero_point]
    made = unused_name(dequantizer.name.removesuffix("/dequantize") + "/quantize", taken)
    return helper.make_node("QuantizeLinear", inputs, [made], made, axis=axis)
