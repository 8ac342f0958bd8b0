"""Adds zero channels where TensorRT has a faster kernel for more channels; the network computes the same.

A residual block ends with a 1x1 convolution whose output is added to the skip branch. The speed of that convolution
with its addition depends on how its kernel moves memory. On an H200 TensorRT 8.6 has a better kernel from 128 input
channels on: the last convolutions of ResNet50's first stage, which have 64, get faster with 64 more channels that are
zero, although there is more to compute (benchmarks/gpu_trials.txt). Whether that holds for another network, GPU or
version has to be measured: ``deploy.benchmark --variants`` compares the files.

The channels are added between two convolutions: the first computes more of them (weights and bias zero), and the second
ignores them (weights zero), so that nothing else of the network changes. This is done in the file because TensorRT
8.6.0 builds engines with wrong answers when constants are changed after it has parsed the network.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from export.int8_convolutions import Int8Convolutions
from export.lower import Clip
from qat.graph.fx_network import kind_of
from qat.graph.operations import FUSED_ACTIVATIONS

CHANNELS = 128
"""Input channels that a convolution is padded to."""


def pad_channels(folded: fx.GraphModule) -> list[str]:
    """Pads, inside ``folded`` (from export.fold.fold), the input channels of convolutions that end residual blocks.

    Those with fewer than 128 input channels get 128. Returns their paths; [] if there are none.
    """
    calls = Int8Convolutions(folded)
    found = {str(node.target): first for node in folded.graph.nodes if (first := _first(calls, node)) is not None}
    for path, first in found.items():
        _pad(first, folded.get_submodule(path))
    return list(found)


def _first(calls: Int8Convolutions, node: fx.Node) -> nn.Conv2d | None:
    """The convolution before the one that ``node`` calls, if zero channels fit between the two."""
    second = calls.convolution(node)
    if second is None or second.kernel_size != (1, 1) or second.in_channels >= CHANNELS or not _is_added(calls, node):
        return None
    (source,) = node.all_input_nodes
    while len(source.users) == 1:
        if (first := calls.convolution(source)) is not None:
            return first
        if not _keeps_channels_apart(calls, source):
            return None
        (source,) = source.all_input_nodes
    return None


def _is_added(calls: Int8Convolutions, node: fx.Node) -> bool:
    """Whether an addition with another tensor is the only reader of ``node``."""
    readers = list(node.users)
    return len(readers) == 1 and calls.is_sum_of_two(readers[0])


def _keeps_channels_apart(calls: Int8Convolutions, node: fx.Node) -> bool:
    """Whether ``node`` computes every channel from the same channel of its one input, and all in the same way."""
    module = calls.module(node)
    if calls.is_quantizer(node) or isinstance(module, Clip):
        return True
    learned = module is not None and any(True for _ in module.parameters())  # PReLU may have a slope for each channel
    return kind_of(node, calls.modules) in FUSED_ACTIVATIONS and len(node.all_input_nodes) == 1 and not learned


def _pad(first: Any, second: Any) -> None:
    more = CHANNELS - second.in_channels
    quantizer = first.weight_quantizer
    first.weight = F.pad(first.weight, (0, 0) * 3 + (0, more))
    first.bias = nn.Parameter(F.pad(first.bias, (0, more)), requires_grad=False)
    quantizer.scale = F.pad(quantizer.scale, (0, more), value=1.0)
    quantizer.zero_point = F.pad(quantizer.zero_point, (0, more))
    second.weight = F.pad(second.weight, (0, 0) * 2 + (0, more))
    first.out_channels = second.in_channels = CHANNELS
