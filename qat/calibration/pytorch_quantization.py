"""Takes over the ranges in a checkpoint of pytorch-quantization, whose amax buffers belong to modules:

    <module>._input_quantizer._amax      input of a convolution, linear layer or pooling, per tensor
    <module>._weight_quantizer._amax     weight of that layer, [C, 1, 1, 1] or [C, 1]
    <block>.residual_quantizer._amax     shortcut that the block's addition reads

Both projects define scale = amax / 127. All other entries of such a file are the weights of the float network.
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
    """Splits a state dict into weights, and amax by key; the latter is {} if it is not from pytorch-quantization.

    Raises UserError for an amax that is negative, NaN or infinite.
    """
    ranges = {key: tensor for key, tensor in state.items() if f".{key}".endswith((_INPUT, _WEIGHT, _SHORTCUT))}
    for key, amax in ranges.items():
        if not (amax.isfinite().all() and (amax >= 0).all()):
            raise UserError(f"{key} in the weights is negative, NaN or infinite: calibrate that network again")
    return {key: tensor for key, tensor in state.items() if key not in ranges}, ranges


def set_imported_ranges(prepared: fx.GraphModule, ranges: Mapping[str, Tensor]) -> list[str]:
    """Writes ``ranges`` into the quantizers that they belong to; returns lines that say which fitted and which did not.

    If several ranges belong to one quantizer, such as those of a block's first convolution and of its shortcut, the
    largest is used. The range of a weight is fixed only if it differs from the largest magnitude, which a
    WeightQuantizer follows by itself.
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
    lines = [f"ranges of {tensors} and {weights} weights come from the checkpoint"]
    if lacking:
        lines.append(f"not in the checkpoint, so calibrated here: {', '.join(lacking)}")
    if unused := [key for key in ranges if key not in used]:
        lines.append(f"in the checkpoint, but not used, because nothing is quantized there: {', '.join(unused)}")
    return lines


def _key_of_read(reader: fx.Node, ranges: Mapping[str, Tensor]) -> str:
    """The key of the range that ``reader`` reads; for an addition, that of the block whose module's output it adds."""
    if reader.op == "call_module":
        return f"{reader.target}{_INPUT}"
    for source in reader.all_input_nodes:
        module = str(source.target) if source.op == "call_module" else ""
        while module := module.rpartition(".")[0]:
            if module + _SHORTCUT in ranges:
                return module + _SHORTCUT
    return ""
