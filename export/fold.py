"""A trained quantized network -> the network that the engine computes: INT8 weight codes, no batch normalization.

Batch normalization y = g * conv(x, W) + b moves into the weight's scales: W' = W * g has amax' = amax * |g|, so its
codes are those of W, with the sign of g. Folding changes no code, and what was trained is what is deployed.

``fold_float`` makes the float twin, which speed is compared with: the same weights, no quantizer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from export import ops
from export.lower import lower, unused_path
from qat.fake_quantize.layers import quantized_layer
from qat.fake_quantize.quantizer import (
    SCALE_FLOOR,
    WEIGHT,
    ActivationQuantizer,
    WeightQuantizer,
    per_channel,
    quantize,
    scale_from_amax,
)
from qat.graph.fx_network import label, layer_of

_Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@dataclass(frozen=True)
class DeadChannel:
    """A channel whose weight is zero, or becomes zero by batch normalization: its scale was floored."""

    layer: str
    channel: int


class QuantizeDequantize(nn.Module):
    """A calibrated activation quantizer: scale [] float32, zero point [] int8."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape, float32, rounded to its INT8 grid."""
        return ops.quantize_dequantize(x, self.scale, self.zero_point)


class Dequantize(nn.Module):
    """Stands where the weight quantizer stood: turns INT8 codes into the weight. scale [C], zero point [C]."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(scale.shape, dtype=torch.int8))
        self.axis = axis

    def forward(self, codes: Tensor) -> Tensor:
        """INT8 codes to float32, same shape."""
        return ops.dequantize(codes, self.scale, self.zero_point, self.axis)


class DequantizeInput(nn.Module):
    """Stands where the quantizer of the network's input stood, when the caller quantizes: scale [], zero point []."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: QuantizeDequantize) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale)
        self.register_buffer("zero_point", quantizer.zero_point)

    def forward(self, codes: Tensor) -> Tensor:
        """INT8 codes to float32, same shape."""
        return ops.dequantize_input(codes, self.scale, self.zero_point)


def fold(prepared: fx.GraphModule) -> tuple[fx.GraphModule, list[DeadChannel]]:
    """Folds a prepared and calibrated model for inference; ``prepared`` stays as it is.

    Returns the folded module (float32 NCHW in, logits out, same node names) and the channels whose scale was floored.
    """
    folded = copy.deepcopy(prepared).eval().requires_grad_(False)
    dead: list[DeadChannel] = []
    _layers_from_functions(folded)
    _fold_batch_norms(folded, dead)
    for name, module in list(folded.named_modules()):
        if isinstance(module, ActivationQuantizer):
            folded.set_submodule(name, QuantizeDequantize(scale_from_amax(module.amax)))
        elif isinstance(getattr(module, "weight_quantizer", None), WeightQuantizer):
            _store_codes(name, module, None, dead)
    return _finished(folded), dead


def fold_float(prepared: fx.GraphModule) -> fx.GraphModule:
    """Folds a prepared model without its quantizers: float weights as trained; ``prepared`` stays as it is.

    Returns the folded module: float32 NCHW in, logits out, node names as those of ``fold``.
    """
    folded = copy.deepcopy(prepared).eval().requires_grad_(False)
    _layers_from_functions(folded)
    _remove_quantizers(folded)
    _fold_batch_norms(folded, [])
    return _finished(folded)


def _finished(folded: fx.GraphModule) -> fx.GraphModule:
    """``folded`` in operations that the exporter keeps, without what is no longer used."""
    lower(folded)
    folded.delete_all_unused_submodules()
    folded.graph.lint()
    folded.recompile()
    return folded


def _layers_from_functions(folded: fx.GraphModule) -> None:
    """Convolutions and matrix products that are function calls on a quantized weight -> layers, as all others are."""
    modules = dict(folded.named_modules())
    for node in list(folded.graph.nodes):
        weights = [
            source for source in node.all_input_nodes if isinstance(modules.get(str(source.target)), WeightQuantizer)
        ]
        if node.op not in ("call_function", "call_method") or not weights:
            continue
        path = unused_path(folded, label(node))
        layer: Any = quantized_layer(layer_of(node, folded))
        if (amax := modules[str(weights[0].target)].amax) is not None:
            layer.weight_quantizer.fix(amax)
        folded.add_submodule(path, layer)
        given, bystanders = node.args[0], node.all_input_nodes[1:]
        with folded.graph.inserting_before(node):
            call = folded.graph.call_module(path, (given,))
        node.replace_all_uses_with(call)
        call.meta = dict(node.meta)
        folded.graph.erase_node(node)
        for source in (*bystanders, *(weight.args[0] for weight in weights)):
            if not source.users:
                folded.graph.erase_node(source)


def _remove_quantizers(folded: fx.GraphModule) -> None:
    modules = dict(folded.named_modules())
    for node in list(folded.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], ActivationQuantizer):
            node.replace_all_uses_with(node.args[0])
            folded.graph.erase_node(node)
    for module in modules.values():
        if isinstance(getattr(module, "weight_quantizer", None), WeightQuantizer):
            module.weight_quantizer = nn.Identity()


def _fold_batch_norms(folded: fx.GraphModule, dead: list[DeadChannel]) -> None:
    """Folds each batch normalization that alone reads a convolution, and removes its node."""
    modules = dict(folded.named_modules())
    calls: dict[str, int] = {}
    for node in folded.graph.nodes:
        calls[str(node.target)] = calls.get(str(node.target), 0) + (node.op == "call_module")
    for node in list(folded.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) not in get_args(_Norm):
            continue
        source, norm = node.args[0], modules[node.target]
        if source.op != "call_module" or len(source.users) != 1 or norm.running_var is None:
            continue
        layer, name = modules[source.target], str(source.target)
        # Behind a linear layer normalization may run over another axis than the layer's channels.
        if calls[name] != 1 or not isinstance(layer, nn.modules.conv._ConvNd) or "weight" not in layer._parameters:
            continue
        if isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1:
            continue  # its weight has one channel of axis 1 for several output channels
        if isinstance(getattr(layer, "weight_quantizer", None), WeightQuantizer):
            _store_codes(name, layer, norm, dead)
        else:
            _fold_float(layer, norm)
        node.replace_all_uses_with(source)
        folded.graph.erase_node(node)


def _store_codes(name: str, layer: Any, norm: _Norm | None, dead: list[DeadChannel]) -> None:
    """Replaces the weight of ``layer`` by INT8 codes and its quantizer by a dequantizer, with ``norm`` folded in."""
    quantizer, weight = layer.weight_quantizer, layer.weight.detach()
    scale = quantizer.scale(weight)
    codes = quantize(weight, per_channel(scale, weight.ndim, quantizer.axis), WEIGHT)
    if norm is not None:
        factor, shift = _affine(norm)
        codes = codes * per_channel(torch.where(factor < 0, -1.0, 1.0), weight.ndim, quantizer.axis)
        scale = scale * factor.abs()
        bias = 0 if layer.bias is None else layer.bias.detach()
        layer.bias = nn.Parameter(shift + bias * factor, requires_grad=False)
    # A channel whose scale vanishes computes zero: zero codes with the smallest normal scale say so to TensorRT.
    vanished = scale <= SCALE_FLOOR
    codes = codes.masked_fill(per_channel(vanished, weight.ndim, quantizer.axis), 0)
    dead.extend(DeadChannel(name, int(channel)) for channel in vanished.nonzero().flatten())
    del layer.weight
    layer.register_buffer("weight", codes.to(torch.int8))
    layer.weight_quantizer = Dequantize(scale.clamp(min=SCALE_FLOOR), quantizer.axis)


def _fold_float(layer: Any, norm: _Norm) -> None:
    factor, shift = _affine(norm)
    axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    bias = 0 if layer.bias is None else layer.bias.detach()
    layer.weight = nn.Parameter(layer.weight * per_channel(factor, layer.weight.ndim, axis), requires_grad=False)
    layer.bias = nn.Parameter(shift + bias * factor, requires_grad=False)


def _affine(norm: _Norm) -> tuple[Tensor, Tensor]:
    """Batch normalization as y = x * factor + shift, each [C] float32; computed in float64."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    factor = (1.0 if norm.weight is None else norm.weight.double()) / deviation
    shift = (0.0 if norm.bias is None else norm.bias.double()) - norm.running_mean.double() * factor
    return factor.float(), shift.float()
