"""Zero channels where TensorRT has a faster kernel for more of them; the network computes the same.

A residual block ends with a 1x1 convolution whose output is added to the skip branch, and that convolution with its
addition is bound by how its kernel moves memory. On an H200 TensorRT 8.6 has a better kernel from 128 input channels
on: the last convolutions of ResNet50's first stage, which have 64, get faster with 64 more channels that are zero,
although there is more to compute (benchmarks/gpu_trials.txt). Whether that holds for another network, GPU or version
has to be measured: ``deploy.benchmark --padded`` compares the two files.

The channels are added between two convolutions: the first computes more (weights and bias zero), the second ignores
them (weights zero), so that nothing else of the network changes. This is done in the file because TensorRT 8.6.0 builds
engines with wrong answers when constants of the network that it has parsed are changed.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from export.fold import Dequantize, QuantizeDequantize
from export.lower import Clip
from qat.fx_network import kind_of

CHANNELS = 128
"""Input channels that a convolution is padded to."""


def pad_channels(folded: fx.GraphModule) -> list[str]:
    """Pads, inside ``folded`` (from export.fold.fold), what ends residual blocks with fewer than 128 input channels.

    Returns the paths of the convolutions whose input was padded.
    """
    places = _Places(folded)
    found = {str(node.target): first for node in folded.graph.nodes if (first := places.before(node)) is not None}
    for path, first in found.items():
        _pad(first, folded.get_submodule(path))
    return list(found)


class _Places:
    """Finds where zero channels fit: between two convolutions, on a path that nothing else reads."""

    def __init__(self, folded: fx.GraphModule) -> None:
        self.modules = dict(folded.named_modules())
        self.called = [node.target for node in folded.graph.nodes if node.op == "call_module"]

    def before(self, node: fx.Node) -> nn.Module | None:
        """The convolution before the one that ``node`` calls, where zero channels fit between them."""
        second = self._convolution(node)
        if second is None or second.kernel_size != (1, 1) or second.in_channels >= CHANNELS or not self._is_added(node):
            return None
        (source,) = node.all_input_nodes
        while len(source.users) == 1:
            if (first := self._convolution(source)) is not None:
                return first
            if not self._keeps_channels_apart(source):
                return None
            (source,) = source.all_input_nodes
        return None

    def _convolution(self, node: fx.Node) -> nn.Conv2d | None:
        """What ``node`` calls, where that is an INT8 convolution without groups, called only here."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.Conv2d) or not isinstance(getattr(module, "weight_quantizer", None), Dequantize):
            return None
        return module if module.groups == 1 and self.called.count(node.target) == 1 else None

    def _is_added(self, node: fx.Node) -> bool:
        """Whether an addition with another tensor is all that reads ``node``."""
        readers = list(node.users)
        return len(readers) == 1 and len(readers[0].all_input_nodes) == 2 and kind_of(readers[0], self.modules) == "add"

    def _keeps_channels_apart(self, node: fx.Node) -> bool:
        """Whether ``node`` treats every channel of its one input alike and by itself."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (QuantizeDequantize, Clip)):
            return True
        learned = module is not None and any(True for _ in module.parameters())  # PReLU may have a slope a channel
        return kind_of(node, self.modules) == "activation" and len(node.all_input_nodes) == 1 and not learned


def _pad(first: Any, second: Any) -> None:
    more = CHANNELS - second.in_channels
    quantizer = first.weight_quantizer
    first.weight = F.pad(first.weight, (0, 0) * 3 + (0, more))
    first.bias = nn.Parameter(F.pad(first.bias, (0, more)), requires_grad=False)
    quantizer.scale = F.pad(quantizer.scale, (0, more), value=1.0)
    quantizer.zero_point = F.pad(quantizer.zero_point, (0, more))
    second.weight = F.pad(second.weight, (0, 0) * 2 + (0, more))
    first.out_channels = second.in_channels = CHANNELS
