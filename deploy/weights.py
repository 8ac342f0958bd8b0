"""INT8 weights as float weights with a QuantizeLinear: the same numbers, for builders that refuse INT8 constants.

An older TensorRT hands some operators (a Cast of uint8 input among them) to a part of it that walks over all constants
of the network and stops at the first INT8 one. The builder quantizes the float weights back to the same codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.graph import Graph, constant_value, set_constant

if TYPE_CHECKING:
    import tensorrt as trt

    from deploy.trt import Toolkit


def as_float(network: trt.INetworkDefinition, toolkit: Toolkit) -> list[np.ndarray]:
    """Replaces every constant of INT8 codes in front of a DequantizeLinear by float weights and a QuantizeLinear.

    Returns the arrays that the network now refers to: they must live until it has been built.
    """
    module = toolkit.module
    graph = Graph(network)
    makers = graph.makers
    kept: list[np.ndarray] = []
    quantized: dict[str, Any] = {}  # a constant may have several readers
    for layer in graph.layers:
        if layer.type.name != "DEQUANTIZE":
            continue
        tensor = layer.get_input(0)
        if tensor.name in quantized:
            layer.set_input(0, quantized[tensor.name])
            continue
        codes, scale = (_constant(layer.get_input(index), makers, module) for index in range(2))
        if codes is None or scale is None or codes.dtype != np.int8:
            continue
        layer.__class__ = module.IDequantizeLayer
        shape = [1] * codes.ndim
        if scale.size > 1:
            shape[layer.axis] = -1
        kept.append(np.ascontiguousarray(codes * scale.reshape(shape).astype(np.float32)))
        set_constant(makers[tensor.name], kept[-1], module)  # in place: no INT8 constant is left behind
        quantize = toolkit.add_quantize(network, tensor, layer.get_input(1))
        quantize.axis, quantize.name = layer.axis, f"{tensor.name}/quantize"
        quantized[tensor.name] = quantize.get_output(0)
        layer.set_input(0, quantized[tensor.name])
    return kept


def _constant(tensor: trt.ITensor, makers: dict[str, Any], module: Any) -> np.ndarray | None:
    """The value of a tensor; None where it is no constant."""
    maker = makers.get(tensor.name)
    return constant_value(maker, module) if maker is not None and maker.type.name == "CONSTANT" else None
