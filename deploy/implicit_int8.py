"""Implicit INT8, which older versions of TensorRT have: each tensor gets a range, and the builder chooses precisions.

It is only for comparison. All tensors get the same range, so such an engine shows how fast implicit INT8 is, and
nothing about its accuracy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorrt as trt

DYNAMIC_RANGE = 4.0


def set_dynamic_ranges(network: trt.INetworkDefinition) -> None:
    """Gives every tensor of a float network the range [-4, 4], so that the builder may run every layer in INT8."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for tensor in (*inputs, *(layer.get_output(i) for layer in layers for i in range(layer.num_outputs))):
        tensor.set_dynamic_range(-DYNAMIC_RANGE, DYNAMIC_RANGE)
