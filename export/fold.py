"""A trained quantized network -> the network that the engine computes: weights as codes, no batch normalization.

Batch normalization y = g * conv(x, W) + b moves into the weight's scales: W' = W * g has amax' = amax * |g|, so its
codes are those of W, with the sign of g. Folding changes no magnitude of a code: what was trained is what is deployed.
The weight of a transposed convolution has one scale, so that a normalization behind it that was not folded before
training (qat/fake_quantize/folded_norms.py) stays.

``fold_float`` makes the same network in float, with the same weights and no quantizers: the baseline for speed.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from export import ops
from export.lower import lower, unused_path
from export.plain_norms import plain_norms
from qat.base.console import warn
from qat.base.number_format import NumberFormat
from qat.fake_quantize.folded_norms import affine, fold_into
from qat.fake_quantize.layers import quantized_layer
from qat.fake_quantize.quantizer import (
    SCALE_FLOOR,
    ActivationQuantizer,
    WeightQuantizer,
    per_channel,
    quantize,
    scale_from_amax,
)
from qat.graph.constants import bake_constants
from qat.graph.fx_network import label, layer_of
from qat.graph.modes import keep_evaluation
from qat.graph.outputs import flatten_outputs

_Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_PATHS = "paths_of_functions"  # in the meta of a folded module: {operation: the module that it has become}


@dataclass(frozen=True)
class DeadChannel:
    """A channel of ``layer`` whose weight is zero, or that batch normalization makes zero: its scale was floored."""

    layer: str
    channel: int


class QuantizeDequantize(nn.Module):
    """A calibrated activation quantizer: scale [] float32, zero point [] of the codes' type."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, number_format: NumberFormat) -> None:
        super().__init__()
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", torch.zeros((), dtype=ops.codes_dtype(number_format)))
        self.format = number_format

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of any shape, float32, rounded to the grid of its codes."""
        rounded: Tensor = ops.quantize_dequantize(x, self.scale, self.zero_point)
        return rounded


class Dequantize(nn.Module):
    """Takes the place of a weight quantizer: turns codes into the weight. scale [C], zero point [C]."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, axis: int, number_format: NumberFormat) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(scale.shape, dtype=ops.codes_dtype(number_format)))
        self.axis = axis
        self.format = number_format

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to float32, same shape."""
        weight: Tensor = ops.dequantize(codes, self.scale, self.zero_point, self.axis)
        return weight


class DequantizeInput(nn.Module):
    """Takes the place of the input's quantizer when the caller quantizes: scale [], zero point []."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: QuantizeDequantize) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale)
        self.register_buffer("zero_point", quantizer.zero_point)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to float32, same shape."""
        x: Tensor = ops.dequantize_input(codes, self.scale, self.zero_point)
        return x


def fold(prepared: fx.GraphModule) -> tuple[fx.GraphModule, list[DeadChannel]]:
    """Folds a copy of a prepared and calibrated model for inference, on the CPU; ``prepared`` stays as it is.

    Each quantizer says which number format its codes have.

    Returns the folded module, with the same node names, and the channels whose scale was floored. The module takes and
    answers float32 tensors; the paths of the outputs in the model's answer are in its ``meta["outputs"]``.
    """
    folded = copy.deepcopy(prepared).cpu().eval().requires_grad_(False)
    keep_evaluation(folded)
    folded.meta["outputs"] = flatten_outputs(folded)
    bake_constants(folded, keep=WeightQuantizer)
    plain_norms(folded)
    dead: list[DeadChannel] = []
    _layers_from_functions(folded)
    _fold_batch_norms(folded, dead)
    for name, module in list(folded.named_modules()):
        if isinstance(module, ActivationQuantizer):
            folded.set_submodule(name, QuantizeDequantize(scale_from_amax(module.amax, module.format), module.format))
        elif isinstance(getattr(module, "weight_quantizer", None), WeightQuantizer):
            _store_codes(name, module, None, dead)
    return _finish(folded), dead


def fold_float(prepared: fx.GraphModule) -> fx.GraphModule:
    """Folds a copy of a prepared model without its quantizers, on the CPU; ``prepared`` stays as it is.

    Weights are float, as they were trained. Returns the folded module, with the node names and outputs that ``fold``
    gives.
    """
    folded = copy.deepcopy(prepared).cpu().eval().requires_grad_(False)
    keep_evaluation(folded)
    folded.meta["outputs"] = flatten_outputs(folded)
    bake_constants(folded, keep=WeightQuantizer)
    plain_norms(folded)
    _layers_from_functions(folded)
    _remove_quantizers(folded)
    _fold_batch_norms(folded, [])
    return _finish(folded)


def layer_paths(folded: fx.GraphModule) -> dict[str, str]:
    """The module that each operation of the prepared network has become, by the operation's name."""
    called = {node.name: str(node.target) for node in folded.graph.nodes if node.op == "call_module"}
    functions: dict[str, str] = folded.meta.get(_PATHS, {})
    return called | functions


def remaining_dead_channels(folded: nn.Module, dead: list[DeadChannel]) -> list[DeadChannel]:
    """The channels among ``dead`` that still exist and are zero: merging removes layers and changes weights."""
    layers: dict[str, Any] = dict(folded.named_modules())
    there = [(channel, layers[channel.layer]) for channel in dead if channel.layer in layers]
    return [one for one, layer in there if not layer.weight.select(layer.weight_quantizer.axis, one.channel).any()]


def warn_of_dead_channels(dead: list[DeadChannel]) -> None:
    """Names them, a line for each layer."""
    for layer, channels in itertools.groupby(dead, lambda channel: channel.layer):
        numbers = [channel.channel for channel in channels]
        listed = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        warn(f"{layer}: dead channels {listed}, {len(numbers)} in all: their weights are zero; the scales were floored")


def _finish(folded: fx.GraphModule) -> fx.GraphModule:
    """Puts operations that the exporter keeps into ``folded`` and removes what is no longer used."""
    lower(folded)
    folded.delete_all_unused_submodules()
    folded.graph.lint()
    folded.recompile()
    return folded


def _layers_from_functions(folded: fx.GraphModule) -> None:
    """Turns convolutions and matrix products that are function calls on a quantized weight into layers."""
    modules = dict(folded.named_modules())
    for node in list(folded.graph.nodes):
        weights = [
            source for source in node.all_input_nodes if isinstance(modules.get(str(source.target)), WeightQuantizer)
        ]
        if node.op not in ("call_function", "call_method") or not weights:
            continue
        path = unused_path(folded, label(node))
        layer: Any = quantized_layer(layer_of(node, folded))
        quantizer: Any = modules[str(weights[0].target)]
        layer.weight_quantizer.format = quantizer.format
        if quantizer.amax is not None:
            layer.weight_quantizer.fix(quantizer.amax)
        folded.add_submodule(path, layer)
        given, bystanders = node.args[0], node.all_input_nodes[1:]
        with folded.graph.inserting_before(node):
            call = folded.graph.call_module(path, (given,))
        node.replace_all_uses_with(call)
        call.meta = dict(node.meta)
        folded.meta.setdefault(_PATHS, {})[node.name] = path
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
    """Folds each batch normalization that is the only reader of a convolution, and removes its node."""
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
        # Not into a linear layer: the normalization may run over another axis than the layer's channels.
        if calls[name] != 1 or not isinstance(layer, nn.modules.conv._ConvNd) or "weight" not in layer._parameters:
            continue
        if isinstance(layer, nn.modules.conv._ConvTransposeNd) and layer.groups > 1:
            continue  # its weight has one channel of axis 1 for several output channels
        if isinstance(quantizer := getattr(layer, "weight_quantizer", None), WeightQuantizer):
            if quantizer.axis is None:
                continue  # one scale, where each channel would need its own
            _store_codes(name, layer, norm, dead)
        else:
            fold_into(layer, norm)
        node.replace_all_uses_with(source)
        folded.graph.erase_node(node)


def _store_codes(name: str, layer: Any, norm: _Norm | None, dead: list[DeadChannel]) -> None:
    """Replaces the weight of ``layer`` by codes and its quantizer by a dequantizer, with ``norm`` folded in.

    One scale becomes a vector of equal ones along axis 1, the output channels of a transposed convolution.
    """
    quantizer, weight = layer.weight_quantizer, layer.weight.detach()
    scale, axis = quantizer.scale(weight), quantizer.axis
    if axis is None:
        scale, axis = scale.repeat(weight.shape[1]), 1
    codes = quantize(weight, per_channel(scale, weight.ndim, axis), quantizer.format)
    if norm is not None:
        factor, shift = affine(norm)
        codes = codes * per_channel(torch.where(factor < 0, -1.0, 1.0), weight.ndim, axis)
        scale = scale * factor.abs()
        bias = 0 if layer.bias is None else layer.bias.detach()
        layer.bias = nn.Parameter(shift + bias * factor, requires_grad=False)
    # A channel whose scale vanishes computes zero. TensorRT refuses a scale of zero, so the channel gets zero codes and
    # the smallest normal scale.
    vanished = scale <= SCALE_FLOOR
    codes = codes.masked_fill(per_channel(vanished, weight.ndim, axis), 0)
    dead.extend(DeadChannel(name, int(channel)) for channel in vanished.nonzero().flatten())
    del layer.weight
    layer.register_buffer("weight", codes.to(ops.codes_dtype(quantizer.format)))
    layer.weight_quantizer = Dequantize(scale.clamp(min=SCALE_FLOOR), axis, quantizer.format)
