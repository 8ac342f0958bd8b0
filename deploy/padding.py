"""Zero channels where the builder has a faster kernel for more of them; the network computes the same.

A residual block ends with a 1x1 convolution whose output is added to the skip branch, and that convolution with its
addition is bound by how its kernel moves memory. On an H200 the builder has a better kernel from 128 input channels on:
the last convolutions of ResNet50's first stage, which have 64, get faster with 64 more channels that are zero, although
there is more to compute (benchmarks/gpu_trials.txt). Whether that holds for another network, GPU or version is
measured, not assumed: ``deploy.build --pad-channels`` builds both and keeps the faster engine.

The channels are added between two convolutions: the first computes more (weights and bias zero), the second ignores
them (weights zero), so that nothing else of the network changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.graph import Graph, constant_value, set_constant

if TYPE_CHECKING:
    import tensorrt as trt

    from deploy.trt import Toolkit

CHANNELS = 128
"""Input channels that a convolution is padded to."""

# What may stand between the two convolutions: it treats every channel by itself.
_BY_CHANNEL = ("QUANTIZE", "DEQUANTIZE", "ACTIVATION")


@dataclass(frozen=True)
class Pair:
    """Two convolutions with a tensor between them that nothing else reads."""

    first: Any
    second: Any


def pad_channels(network: trt.INetworkDefinition, toolkit: Toolkit) -> tuple[list[str], list[np.ndarray]]:
    """Pads what ends residual blocks with fewer than 128 input channels.

    Returns the names of the convolutions that were padded, and arrays that must live until the network has been built.
    """
    graph = _Padding(network, toolkit.module)
    pairs = [pair for layer in graph.layers if (pair := graph.pair(layer)) is not None]
    kept: list[np.ndarray] = []
    for pair in pairs:
        kept += graph.pad(pair)
    return [pair.second.name for pair in pairs], kept


class _Padding(Graph):
    """Finds the places of a network where zero channels fit, and puts them there."""

    def __init__(self, network: trt.INetworkDefinition, module: Any) -> None:
        super().__init__(network)
        self.module = module

    def pair(self, second: Any) -> Pair | None:
        """``second`` and the convolution before it, where zero channels fit between them."""
        if not self._is_plain(second) or not self._is_added(second):
            return None
        codes = self._codes(second)
        if codes is None or codes.shape[2:] != (1, 1) or codes.shape[1] >= CHANNELS:
            return None
        tensor = second.get_input(0)
        while self._private(tensor) and (maker := self.makers.get(tensor.name)) is not None:
            if self._is_plain(maker):
                return None if self._codes(maker) is None else Pair(maker, second)
            if maker.type.name not in _BY_CHANNEL:
                return None
            tensor = maker.get_input(0)
        return None

    def pad(self, pair: Pair) -> list[np.ndarray]:
        """Adds the zero channels; returns the new arrays."""
        first, second = pair.first, pair.second
        more = CHANNELS - first.num_output_maps
        kept = self._pad_weights(first, axis=0, more=more) + self._pad_weights(second, axis=1, more=more)
        bias = np.asarray(first.bias)
        if bias.size:
            kept.append(np.concatenate([bias, np.zeros(more, bias.dtype)]))
            first.bias = self.module.Weights(kept[-1])
        first.num_output_maps = CHANNELS
        return kept

    def _pad_weights(self, layer: Any, axis: int, more: int) -> list[np.ndarray]:
        dequantize = self.makers[layer.get_input(1).name]
        codes = self.makers[dequantize.get_input(0).name]
        before = constant_value(codes, self.module)
        channels = before.shape[0]
        kept = [_padded(before, axis, more, 0)]
        set_constant(codes, kept[0], self.module)
        if axis == 0:  # one scale for each output channel; newer parsers add the zero points
            for index in range(1, dequantize.num_inputs):
                maker = self.makers[dequantize.get_input(index).name]
                values = constant_value(maker, self.module)
                if values.size == channels:
                    kept.append(_padded(values, 0, more, 1 if index == 1 else 0))
                    set_constant(maker, kept[-1], self.module)
        return kept

    def _is_plain(self, layer: Any) -> bool:
        if layer.type.name != "CONVOLUTION":
            return False
        layer.__class__ = self.module.IConvolutionLayer
        return bool(layer.num_groups == 1)

    def _is_added(self, layer: Any) -> bool:
        """Whether the layer's output is read by an addition alone."""
        tensor = layer.get_output(0)
        if not self._private(tensor):
            return False
        (reader,) = self.readers[tensor.name]
        if reader.type.name != "ELEMENTWISE":
            return False
        reader.__class__ = self.module.IElementWiseLayer
        return bool(reader.op == self.module.ElementWiseOperation.SUM)

    def _codes(self, layer: Any) -> np.ndarray | None:
        """A convolution's INT8 weights; None where they are not a constant of its own behind a DequantizeLinear."""
        dequantize = self.makers.get(layer.get_input(1).name) if layer.num_inputs == 2 else None
        if dequantize is None or dequantize.type.name != "DEQUANTIZE":
            return None
        constants = [self.makers.get(dequantize.get_input(index).name) for index in range(dequantize.num_inputs)]
        if any(maker is None or maker.type.name != "CONSTANT" for maker in constants):
            return None
        tensors = [dequantize.get_input(index) for index in range(dequantize.num_inputs)]
        if not all(map(self._private, [layer.get_input(1), *tensors])):
            return None
        codes, scale = (constant_value(maker, self.module) for maker in constants[:2])
        dequantize.__class__ = self.module.IDequantizeLayer
        by_output_channel = scale.size == 1 or (dequantize.axis == 0 and scale.size == codes.shape[0])
        return codes if codes.dtype == np.int8 and codes.ndim == 4 and by_output_channel else None

    def _private(self, tensor: Any) -> bool:
        """Whether a tensor has one reader and is no output of the network."""
        return len(self.readers.get(tensor.name, [])) == 1 and tensor.name not in self.outputs


def _padded(array: np.ndarray, axis: int, more: int, value: float) -> np.ndarray:
    shape = list(array.shape)
    shape[axis] = more
    return np.ascontiguousarray(np.concatenate([array, np.full(shape, value, array.dtype)], axis))
