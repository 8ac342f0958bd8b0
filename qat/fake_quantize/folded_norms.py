"""Batch normalization in float weights: y = conv(x, W) * factor + shift = conv(x, W * factor) + shift.

The export folds it into the scales of a weight (export/fold.py), one for each output channel. The weight of a
transposed convolution has one scale, so it takes in its normalization before it is quantized, and trains without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.fake_quantize.quantizer import per_channel
from qat.graph.fx_network import kind_of

FOLDED_NORMS = "folded_norms"
"""Where a prepared model's ``meta`` has the folded normalizations: {path of the layer: path of the normalization}."""


def fold_norm_behind(traced: fx.GraphModule, node: fx.Node) -> None:
    """Folds the batch normalization behind the transposed convolution ``node``, if it reads that and nothing else does.

    An Identity takes its place. It stays if it has no running statistics, or if the weight serves other calls.
    """
    modules = dict(traced.named_modules())
    layer: Any = modules.get(str(node.target)) if node.op == "call_module" else None
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd) or layer.groups > 1 or len(node.users) != 1:
        return
    (reader,) = node.users
    norm: Any = modules.get(str(reader.target)) if reader.op == "call_module" else None
    if norm is None or kind_of(reader, modules) != "batch_norm" or norm.running_var is None:
        return
    called = [modules[str(call.target)] for call in traced.graph.find_nodes(op="call_module")]
    weights = [tensor for _, tensor in traced.named_parameters(remove_duplicate=False)]
    uses = [sum(one is given for one in called) for given in (layer, norm)]
    if uses == [1, 1] and sum(one is layer._parameters.get("weight") for one in weights) == 1:
        fold_norm(traced, str(node.target), str(reader.target))
        traced.meta[FOLDED_NORMS][str(node.target)] = str(reader.target)


def fold_norm(model: nn.Module, layer: str, norm: str) -> None:
    """Folds the batch normalization at the path ``norm`` of ``model`` into the convolution at ``layer``, in place."""
    fold_into(model.get_submodule(layer), model.get_submodule(norm))
    model.set_submodule(norm, nn.Identity())


@torch.no_grad()
def fold_into(layer: Any, norm: Any) -> None:
    """Gives a convolution the float weight and bias with which it computes what ``norm`` makes of it in evaluation."""
    factor, shift = affine(norm)
    axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    learns, bias = layer.weight.requires_grad, 0 if layer.bias is None else layer.bias.detach()
    folded = layer.weight * per_channel(factor, layer.weight.ndim, axis)
    layer.weight = nn.Parameter(folded, requires_grad=learns)
    layer.bias = nn.Parameter(shift + bias * factor, requires_grad=learns)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Batch normalization in evaluation as y = x * factor + shift, each [C] float32; computed in float64."""
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    factor = (1.0 if norm.weight is None else norm.weight.detach().double()) / deviation
    shift = (0.0 if norm.bias is None else norm.bias.detach().double()) - norm.running_mean.double() * factor
    return factor.float(), shift.float()
