"""A parsed INetworkDefinition as a graph: its layers, who makes and who reads each tensor, and its constants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorrt as trt


class Graph:
    """What is known of a parsed network at one moment; layers that are added later are not in it."""

    def __init__(self, network: trt.INetworkDefinition) -> None:
        self.layers: list[Any] = [network.get_layer(index) for index in range(network.num_layers)]
        self.makers: dict[str, Any] = {}
        """The layer that makes a tensor, by the tensor's name."""
        self.readers: dict[str, list[Any]] = {}
        """The layers that read a tensor, by its name."""
        for layer in self.layers:
            for index in range(layer.num_outputs):
                self.makers[layer.get_output(index).name] = layer
            for index in range(layer.num_inputs):
                if (tensor := layer.get_input(index)) is not None:
                    self.readers.setdefault(tensor.name, []).append(layer)
        self.outputs: list[str] = [network.get_output(index).name for index in range(network.num_outputs)]


def constant_value(layer: Any, module: Any) -> np.ndarray:
    """The value of a constant layer, in its shape; ``module`` is TensorRT's own."""
    layer.__class__ = module.IConstantLayer
    return np.asarray(layer.weights).reshape(tuple(layer.shape))


def set_constant(layer: Any, value: np.ndarray, module: Any) -> None:
    """Gives a constant layer another value, which must live until the network has been built."""
    layer.__class__ = module.IConstantLayer
    layer.shape, layer.weights = module.Dims(value.shape), module.Weights(value)
