"""INT8 weights -> float weights in front of a QuantizeLinear: the same codes, for builders that have faults with INT8.

TensorRT 8.6.0 refuses INT8 constants where it merges convolutions of one input into one (inception blocks) and where it
hands a part of the network to another compiler (a cast of uint8 input); seen on an H200.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper


def with_float_weights(model: Path) -> bytes:
    """The content of a Q/DQ ONNX file with float weights; all nodes keep their names, and activations stay as they are.

    The codes stay the same: w = code * scale and w / scale are each off by at most a relative 2^-24, and 127 * 2^-23 is
    far from the half that would round to another code.
    """
    proto = onnx.load(model)
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    quantizers = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        codes, scale = constants.get(node.input[0]), constants.get(node.input[1])
        if codes is not None and scale is not None and codes.data_type == TensorProto.INT8:
            quantizer, added = _quantizer(node, numpy_helper.to_array(codes), numpy_helper.to_array(scale))
            graph.initializer.extend(added)
            node.input[0] = quantizer.output[0]
            quantizers.append(quantizer)
    nodes = [*quantizers, *graph.node]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    return bytes(proto.SerializeToString())


def _quantizer(dequantizer: NodeProto, codes: np.ndarray, scale: np.ndarray) -> tuple[NodeProto, list[TensorProto]]:
    """What ``dequantizer`` is to read instead of ``codes``, and the constants of that node."""
    (made,) = dequantizer.output
    (axis,) = [attribute.i for attribute in dequantizer.attribute if attribute.name == "axis"] or [1]
    channels = [-1 if index == axis % codes.ndim else 1 for index in range(codes.ndim)] if scale.ndim else []
    constants = [
        numpy_helper.from_array(codes.astype(scale.dtype) * scale.reshape(channels), f"{made}/float"),
        numpy_helper.from_array(np.zeros(scale.shape, np.int8), f"{made}/zero_point"),
    ]
    inputs = [constants[0].name, dequantizer.input[1], constants[1].name]
    return helper.make_node("QuantizeLinear", inputs, [f"{made}/codes"], f"{made}/quantize", axis=axis), constants
