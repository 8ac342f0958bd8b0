"""Ranges from a checkpoint of pytorch-quantization: its amax buffers become ours, by the modules that they belong to.

    <module>._input_quantizer._amax      of what a convolution, linear layer or pooling reads, per tensor
    <module>._weight_quantizer._amax     of its weight, [C, 1, 1, 1] or [C, 1]
    <block>.residual_quantizer._amax     of the shortcut that the block's addition reads

scale = amax / 127 there as here. All other entries of such a file are the weights of the float network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from qat.base.errors import UserError
from qat.fake_quantize.prepare import activation_quantizers, placement_of, weights_and_quantizers
from qat.fake_quantize.quantizer import weight_amax

_INPUT, _WEIGHT, _SHORTCUT = "._input_quantizer._amax", "._weight_quantizer._amax", ".residual_quantizer._amax"


def split_ranges(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict as weights, and as amax by key; {} where it is none of pytorch-quantization's.

    Raises UserError for an amax that is no range.
    """
    ranges = {key: tensor for key, tensor in state.items() if f".{key}".endswith((_INPUT, _WEIGHT, _SHORTCUT))}
    for key, amax in ranges.items():
        if not (amax.isfinite().all() and (amax >= 0).all()):
            raise UserError(f"{key} in the weights is negative, NaN or infinite: calibrate that network again")
    return {key: tensor for key, tensor in state.items() if key not in ranges}, ranges


def set_imported_ranges(prepared: fx.GraphModule, ranges: Mapping[str, Tensor]) -> list[str]:
    """Writes ``ranges`` into the quantizers that they belong to; lines that say what did, and what did not.

    Where several belong to one of ours, as those of a block's first convolution and of its shortcut, the largest
    counts. A weight's is kept only where it is not the largest magnitude, which our quantizers follow by
    themselves.
    """
    used: set[str] = set()
    quantizers, nodes = activation_quantizers(prepared), {node.name: node for node in prepared.graph.nodes}
    found: dict[str, list[Tensor]] = {name: [] for name in quantizers}
    for tensor in placement_of(prepared).tensors:
        for read in tensor.reads:
            key = _key_of_read(nodes[read.reader], ranges)
            if key in ranges and ranges[key].numel() == 1:
                used.add(key)
                found[tensor.quantizer].append(ranges[key].float().reshape(()))
    for name, values in found.items():
        if values:
            quantizers[name].amax.copy_(torch.stack(values).max())
    weights = 0
    for path, weight, quantizer in weights_and_quantizers(prepared):
        key = path.removesuffix(".weight_quantizer") + _WEIGHT
        follows = weight_amax(weight, quantizer.axis)
        if key in ranges and ranges[key].numel() in (1, len(follows)):
            used.add(key)
            weights += 1
            amax = ranges[key].float().flatten().expand(len(follows)).to(follows.device)
            if not torch.allclose(amax, follows, rtol=1e-3):
                quantizer.fix(amax)
    lacking = [name for name, values in found.items() if not values]
    tensors = f"{len(found) - len(lacking)} of {len(found)} tensors"
    lines = [f"ranges of {tensors} and {weights} weights are the checkpoint's"]
    if lacking:
        lines.append(f"not in the checkpoint, calibrated here: {', '.join(lacking)}")
    if unused := [key for key in ranges if key not in used]:
        lines.append(f"in the checkpoint, but nothing here is quantized there: {', '.join(unused)}")
    return lines


def _key_of_read(reader: fx.Node, ranges: Mapping[str, Tensor]) -> str:
    """The key of what ``reader`` reads; of an addition's, that of the block one of whose modules it adds."""
    if reader.op == "call_module":
        return f"{reader.target}{_INPUT}"
    for source in reader.all_input_nodes:
        module = str(source.target) if source.op == "call_module" else ""
        while module := module.rpartition(".")[0]:
            if module + _SHORTCUT in ranges:
                return module + _SHORTCUT
    return ""
