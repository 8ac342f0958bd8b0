"""A network as TensorRT's parser read it: its inputs and layers, and which layer makes each tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploy.tensor_types import numpy_name, sizes
from qat.base.artifact import TensorSpec

if TYPE_CHECKING:
    import tensorrt as trt


def kind_of(layer: Any, module: Any) -> str:
    """What a layer is, such as CONVOLUTION; of a pooling and of an activation which one, such as MAX and RELU."""
    kind = str(layer.type.name)
    if kind in ("POOLING", "ACTIVATION"):  # assigning the class is the API's way to reach what a layer's type has
        layer.__class__ = module.IPoolingLayer if kind == "POOLING" else module.IActivationLayer
        kind = str(layer.type.name)
    return kind


class ParsedNetwork:
    """The layers of an INetworkDefinition in order, and which of them makes each tensor."""

    def __init__(self, network: trt.INetworkDefinition) -> None:
        self.layers: list[Any] = [network.get_layer(index) for index in range(network.num_layers)]
        self.makers: dict[str, Any] = {}
        """The layer that makes each tensor, by the tensor's name."""
        for layer in self.layers:
            for index in range(layer.num_outputs):
                self.makers[layer.get_output(index).name] = layer
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        self.inputs = tuple(TensorSpec(one.name, sizes(one.shape), numpy_name(one.dtype)) for one in inputs)
        self.outputs: list[str] = [network.get_output(index).name for index in range(network.num_outputs)]
