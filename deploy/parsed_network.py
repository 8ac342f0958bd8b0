"""A network as TensorRT's parser read it: its layers, and which layer makes each tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt as trt


class ParsedNetwork:
    """The layers of an INetworkDefinition in order, and which of them makes each tensor."""

    def __init__(self, network: trt.INetworkDefinition) -> None:
        self.layers: list[Any] = [network.get_layer(index) for index in range(network.num_layers)]
        self.makers: dict[str, Any] = {}
        """The layer that makes each tensor, by the tensor's name."""
        for layer in self.layers:
            for index in range(layer.num_outputs):
                self.makers[layer.get_output(index).name] = layer
        self.outputs: list[str] = [network.get_output(index).name for index in range(network.num_outputs)]
