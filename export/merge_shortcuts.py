"""Merges a projection shortcut and the convolution that it is added to into one convolution.

A residual block whose shortcut is a 1x1 convolution ends with W a + b + V x + c, which is [W V] [a; x] + (b + c): one
convolution of the concatenated inputs. The shortcut's output, one of the block's widest tensors, is then neither
written nor read, the kernel has no addition, and one quantizer is gone. Where the shortcut skips pixels, a 1x1 max pool
picks those that it reads. The gain on a GPU is in benchmarks/gpu_benchmark.txt.

Both inputs get one scale: the convolution that makes ``a`` is multiplied by the factor between the two scales, so that
the codes of ``a`` stay the same, except for ties. Each output channel gets one weight scale too, the larger of the two,
so that the weights with the smaller one are rounded again. The network then computes almost the same, and the export
says how far it moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from export.fold import QuantizeDequantize
from export.int8_convolutions import Int8Convolutions
from export.lower import unused_path
from qat.fake_quantize.quantizer import SCALE_FLOOR, per_channel, quantize, scale_from_amax
from qat.graph.fx_network import shapes

VECTOR = 32
"""Channels that INT8 kernels move at a time: a part of a concatenation that ends elsewhere has to be copied."""


def merge_shortcuts(folded: fx.GraphModule) -> list[str]:
    """Merges, inside ``folded`` (from export.fold.fold), 1x1 shortcuts into the 1x1 convolutions beside them.

    Returns the paths of the convolutions that took in a shortcut;
    [] if no shortcut can be merged.
    """
    calls, extents = Int8Convolutions(folded), shapes(folded)
    blocks = [block for node in folded.graph.nodes if (block := _block(calls, extents, node)) is not None]
    for block in blocks:
        _merge(folded, block)
    folded.delete_all_unused_submodules()
    folded.graph.lint()
    folded.recompile()
    return [str(block.last.call.target) for block in blocks]


@dataclass(frozen=True)
class _Branch:
    """A 1x1 convolution whose output is added, and the quantizer of its input."""

    call: fx.Node
    convolution: nn.Conv2d
    source: fx.Node


@dataclass(frozen=True)
class _Block:
    """The end of a residual block: ``add`` of two branches; ``maker`` makes the tensor that only ``last`` reads."""

    add: fx.Node
    last: _Branch
    shortcut: _Branch
    maker: nn.Conv2d


def _block(calls: Int8Convolutions, extents: Mapping[str, tuple[int, ...]], add: fx.Node) -> _Block | None:
    """The block that ends with ``add``, if there is one; ``extents`` are the shapes of the floating-point tensors."""
    if not calls.is_sum_of_two(add) or len({extents.get(node.name) for node in add.all_input_nodes}) != 1:
        return None
    one, other = (_branch(calls, node) for node in add.all_input_nodes)
    if one is None or other is None:
        return None
    for last, shortcut in ((one, other), (other, one)):
        keeps_pixels = last.convolution.stride == (1, 1)
        if keeps_pixels and len(last.source.users) == 1 and (maker := _maker(calls, last.source)) is not None:
            return _Block(add, last, shortcut, maker)
    return None


def _branch(calls: Int8Convolutions, added: fx.Node) -> _Branch | None:
    """The branch that ends with ``added``, or with the tensor that ``added`` quantizes for the addition only."""
    if len(added.users) != 1:
        return None
    call = added.all_input_nodes[0] if calls.is_quantizer(added) else added
    convolution = calls.convolution(call)
    if convolution is None or convolution.kernel_size != (1, 1) or convolution.padding not in ((0, 0), "valid", "same"):
        return None
    (source,) = call.all_input_nodes
    if len(call.users) != 1 or convolution.in_channels % VECTOR or not calls.is_quantizer(source):
        return None
    # The network's input may get its codes from the caller.
    return None if source.all_input_nodes[0].op == "placeholder" else _Branch(call, convolution, source)


def _maker(calls: Int8Convolutions, quantizer: fx.Node) -> nn.Conv2d | None:
    """The convolution that makes what ``quantizer`` reads: only a ReLU may stand between, and nothing else reads it."""
    (node,) = quantizer.all_input_nodes
    while len(node.users) == 1:
        if (made := calls.convolution(node, grouped=True)) is not None:
            return made
        if not calls.is_relu(node):
            return None
        (node,) = node.all_input_nodes
    return None


def _merge(folded: fx.GraphModule, block: _Block) -> None:
    last, shortcut = block.last, block.shortcut
    inner, outer = (folded.get_submodule(str(branch.source.target)) for branch in (last, shortcut))
    assert isinstance(inner, QuantizeDequantize)
    assert isinstance(outer, QuantizeDequantize)
    factor = outer.scale / inner.scale
    _scale_output(block.maker, factor)
    _merge_weights(last.convolution, shortcut.convolution, factor)
    graph, quantizer = folded.graph, str(shortcut.source.target)  # both inputs and their concatenation share its scale

    def add_quantizer(x: fx.Node) -> fx.Node:
        call = graph.call_module(quantizer, (x,))
        call.meta = dict(shortcut.source.meta)
        return call

    with graph.inserting_before(block.add):
        x = shortcut.source
        if shortcut.convolution.stride != (1, 1):
            path = unused_path(folded, f"{shortcut.call.name}_pixels")
            folded.add_submodule(path, nn.MaxPool2d(1, shortcut.convolution.stride))
            x = add_quantizer(graph.call_module(path, (x,)))
        both = graph.call_function(torch.cat, ((add_quantizer(last.source.all_input_nodes[0]), x), 1))
        last.call.args = (add_quantizer(both),)
    unused = dict.fromkeys((block.add, *block.add.all_input_nodes, shortcut.call, last.source))
    block.add.replace_all_uses_with(last.call)
    block.add.append(last.call)
    for node in unused:
        if not node.users:
            graph.erase_node(node)


def _scale_output(maker: Any, factor: Tensor) -> None:
    """Makes the output of ``maker`` ``factor`` times as large; its codes stay the same."""
    scale = maker.weight_quantizer.scale
    maker.weight_quantizer.scale = torch.where(scale > SCALE_FLOOR, scale * factor, scale).clamp(min=SCALE_FLOOR)
    maker.bias = nn.Parameter(maker.bias * factor, requires_grad=False)


def _merge_weights(last: Any, shortcut: Any, factor: Tensor) -> None:
    """Makes ``last`` a convolution of its own input, now ``factor`` times as large, and of the shortcut's input."""
    own, taken = (one.weight * per_channel(one.weight_quantizer.scale, 4, 0) for one in (last, shortcut))
    weight = torch.cat((own / factor, taken), 1)
    quantizer = last.weight_quantizer
    quantizer.scale = scale_from_amax(weight.abs().amax((1, 2, 3)), quantizer.format)
    last.weight = quantize(weight, per_channel(quantizer.scale, 4, 0), quantizer.format).to(last.weight.dtype)
    last.bias = nn.Parameter(last.bias + shortcut.bias, requires_grad=False)
    last.in_channels += shortcut.in_channels
