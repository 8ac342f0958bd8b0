"""Takes over the ranges in a checkpoint of pytorch-quantization, whose quantizers are modules of the model:

    <module>._input_quantizer._amax      input of a convolution, linear layer or pooling, per tensor
    <module>._weight_quantizer._amax     weight of that layer: [C, 1, 1, 1] or [C, 1], or [] for all channels
    <block>.residual_quantizer._amax     shortcut that the block's addition reads
    <tensor>_quantizer._amax             a quantizer that the user placed and named after a tensor of ours
    <quantizer>.clip.clip_value_min      a learned range (learn_amax): amax = max(-min, max); _amax is where it began
    <quantizer>.clip.clip_value_max
    <quantizer>._pre_quant_scale         factors on a layer's input, which no Q/DQ node has: refused

Both projects define scale = amax / 127. All other entries of such a file are the weights of the float network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qat.base.errors import UserError
from qat.base.text import first_of
from qat.fake_quantize.folded_norms import FOLDED_NORMS
from qat.fake_quantize.prepare import (
    ACTIVATION_QUANTIZERS,
    activation_quantizers,
    placement_of,
    weights_and_quantizers,
)
from qat.fake_quantize.quantizer import weight_amax
from qat.graph.fx_network import kind_of
from qat.graph.operations import COMMUTING

_AMAX, _MIN, _MAX, _FACTORS = "._amax", ".clip.clip_value_min", ".clip.clip_value_max", "._pre_quant_scale"
_INPUT, _WEIGHT, _SHORTCUT = "._input_quantizer", "._weight_quantizer", ".residual_quantizer"

_NOT_PER_TENSOR = "per channel, where we have one range per tensor"
_NOT_PER_CHANNEL = "of another shape than the weight's scales"
_IN_FLOAT = "nothing is quantized there"
_UNKNOWN = "no tensor of this network has that name"


def is_quantizer_entry(key: str) -> bool:
    """Whether ``key`` of a state dict belongs to a quantizer of pytorch-quantization, not to the float network."""
    return any(
        key.endswith(ending) and key.removesuffix(ending).endswith("quantizer")
        for ending in (_AMAX, _MIN, _MAX, _FACTORS)
    )


def split_ranges(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a state dict into weights, and amax by the path of its quantizer; the latter is {} without quantizers.

    Raises UserError for a range that is negative, NaN or infinite, or that belongs to scaled inputs.
    """
    weights = {key: tensor for key, tensor in state.items() if not is_quantizer_entry(key)}
    ranges: dict[str, Tensor] = {}
    for key in state:
        if key.endswith(_FACTORS) and key not in weights:
            raise UserError(
                f"the weights hold {key}: that layer's input is multiplied by factors before it is quantized, which "
                "INT8 engines do not do; multiply its weights by them, and calibrate that network again without them"
            )
    for quantizer in dict.fromkeys(_quantizer_of(key) for key in state if key not in weights):
        ranges[quantizer] = amax = _amax(state, quantizer)
        if not (amax.isfinite().all() and (amax >= 0).all()):
            raise UserError(f"the range of {quantizer} is negative, NaN or infinite: calibrate that network again")
    return weights, ranges


def _quantizer_of(key: str) -> str:
    for ending in (_AMAX, _MIN, _MAX):
        key = key.removesuffix(ending)
    return key


def _amax(state: Mapping[str, Tensor], quantizer: str) -> Tensor:
    """The range that the quantizer used; a learned one counts, not the one that it began with."""
    low, high = state.get(quantizer + _MIN), state.get(quantizer + _MAX)
    if low is None and high is None:
        return state[quantizer + _AMAX]
    if low is None or high is None:
        raise UserError(f"{quantizer} in the weights has one end of a learned range only: save that network again")
    return torch.maximum(-low, high).detach()


@dataclass(frozen=True)
class ImportedRanges:
    """Which ranges of a prepared model are a checkpoint's.

    ``tensors``: amax [] by activation quantizer. ``weights``: amax [C] by the path of the weight quantizer.
    ``other_tensors``, ``other_weights``: the quantizers for which the checkpoint has no range. ``not_used``: quantizers
    of the checkpoint that have no place here, and why.
    """

    tensors: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    other_tensors: tuple[str, ...]
    other_weights: tuple[str, ...]
    not_used: Mapping[str, str]

    def lines(self) -> list[str]:
        """How many ranges are the checkpoint's, what was calibrated here, and what was not used."""
        tensors = f"{len(self.tensors)} of {len(self.tensors) + len(self.other_tensors)} ranges of activations"
        weights = f"{len(self.weights)} of {len(self.weights) + len(self.other_weights)} of weights"
        lines = [f"{tensors} and {weights} are the checkpoint's"]
        if others := (*self.other_tensors, *self.other_weights):
            why = "" if _UNKNOWN in self.not_used.values() else ", as the original does not quantize them"
            lines.append(f"not in the checkpoint{why}, so calibrated here: {first_of(others)}")
        for reason, count in Counter(self.not_used.values()).items():
            names = [name for name, why in self.not_used.items() if why == reason]
            lines.append(f"{count} in the checkpoint, but not used, because {reason}: {first_of(names)}")
        return lines

    def record(self) -> dict[str, Any]:
        """The names, for the details of a checkpoint."""
        return {
            "from_checkpoint": {"tensors": list(self.tensors), "weights": list(self.weights)},
            "calibrated_here": {"tensors": list(self.other_tensors), "weights": list(self.other_weights)},
            "not_used": dict(self.not_used),
        }


def match_ranges(prepared: fx.GraphModule, ranges: Mapping[str, Tensor]) -> ImportedRanges:
    """Finds the quantizers of ``prepared`` that ``ranges`` belong to, and changes nothing.

    If several ranges belong to one quantizer, such as those of a block's first convolution and of its shortcut, the
    largest is used.
    """
    found: dict[str, list[str]] = {name: [] for name in activation_quantizers(prepared)}
    for name, key in (*_of_modules(prepared), *_of_shortcuts(prepared, ranges), *_of_names(prepared, ranges)):
        if key in ranges and ranges[key].numel() == 1:
            found[name].append(key)
    tensors = {
        name: torch.stack([ranges[key].float().reshape(()) for key in keys]).max()
        for name, keys in found.items()
        if keys
    }
    weights: dict[str, Tensor] = {}
    other_weights: list[str] = []
    used = {key for keys in found.values() for key in keys}
    for path, weight, quantizer in weights_and_quantizers(prepared):
        layer, axis = path.removesuffix(".weight_quantizer"), quantizer.axis
        key, folded = layer + _WEIGHT, layer in prepared.meta[FOLDED_NORMS]  # another weight than the range is of
        if key in ranges and not folded and _fits(ranges[key], weight, axis):
            used.add(key)
            weights[path] = ranges[key].float().flatten().expand(() if axis is None else weight.shape[axis])
        else:
            other_weights.append(path)
    other_tensors = tuple(name for name in found if name not in tensors)
    not_used = {key: _why_not(prepared, key, ranges[key]) for key in ranges if key not in used}
    return ImportedRanges(tensors, weights, other_tensors, tuple(other_weights), not_used)


def set_imported_ranges(prepared: fx.GraphModule, ranges: Mapping[str, Tensor]) -> ImportedRanges:
    """Writes ``ranges`` into the quantizers that they belong to, bit by bit.

    The range of a weight is fixed only if it differs from the largest magnitude, which a WeightQuantizer follows by
    itself.
    """
    imported, quantizers = match_ranges(prepared, ranges), activation_quantizers(prepared)
    for name, amax in imported.tensors.items():
        quantizers[name].amax.copy_(amax)
    for path, weight, quantizer in weights_and_quantizers(prepared):
        if path in imported.weights:
            amax, follows = imported.weights[path].to(weight.device), weight_amax(weight, quantizer.axis)
            if not torch.equal(amax, follows):
                quantizer.fix(amax)
    return imported


# --- which quantizer a range belongs to: pairs of (activation quantizer, path of the range's quantizer)


def _of_modules(prepared: fx.GraphModule) -> Iterator[tuple[str, str]]:
    """The tensor that a module reads, also through dropout and other operations that only move data."""
    modules = dict(prepared.named_modules())
    for node in prepared.graph.find_nodes(op="call_module"):
        source = node.args[0] if node.args else None
        while isinstance(source, fx.Node) and not _is_quantizer(source) and kind_of(source, modules) in COMMUTING:
            source = source.args[0] if source.args else None
        if isinstance(source, fx.Node) and _is_quantizer(source):
            yield str(source.target).removeprefix(f"{ACTIVATION_QUANTIZERS}."), f"{node.target}{_INPUT}"


def _is_quantizer(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(f"{ACTIVATION_QUANTIZERS}.")


def _of_shortcuts(prepared: fx.GraphModule, ranges: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The quantized tensors that additions read, with the shortcut of the block whose module's output they add."""
    nodes = {node.name: node for node in prepared.graph.nodes}
    for tensor in placement_of(prepared).tensors:
        for read in tensor.reads:
            if nodes[read.reader].op != "call_module":
                yield tensor.quantizer, _shortcut(nodes[read.reader], ranges)


def _shortcut(addition: fx.Node, ranges: Mapping[str, Tensor]) -> str:
    for source in addition.all_input_nodes:
        module = str(source.target) if source.op == "call_module" else ""
        while module := module.rpartition(".")[0]:
            if module + _SHORTCUT in ranges:
                return module + _SHORTCUT
    return ""


def _of_names(prepared: fx.GraphModule, ranges: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Tensors after which a quantizer of the user is named: layer1.0.relu_quantizer, if relu is called once there."""
    tensors = {tensor.tensor: tensor.quantizer for tensor in placement_of(prepared).tensors}
    names = [node.name for node in prepared.graph.nodes]
    for key in ranges:
        stem = key.removesuffix("_quantizer").replace(".", "_")
        if stem in tensors and f"{stem}_1" not in names:
            yield tensors[stem], key


# --- what does not fit


def _fits(amax: Tensor, weight: Tensor, axis: int | None) -> bool:
    """Whether ``amax`` has one range, or one for each channel of ``axis``: [C], or C along that axis."""
    if axis is None:
        return amax.numel() == 1
    channels = weight.shape[axis]
    shape = [channels if dimension == axis else 1 for dimension in range(weight.ndim)]
    return amax.numel() == 1 or list(amax.shape) in ([channels], shape)


def _why_not(prepared: fx.GraphModule, quantizer: str, amax: Tensor) -> str:
    owner = quantizer.rpartition(".")[0]
    is_weight = quantizer.endswith(_WEIGHT)
    if owner not in dict(prepared.named_modules()) or not quantizer.endswith((_INPUT, _WEIGHT, _SHORTCUT)):
        return _UNKNOWN
    if is_weight and f"{owner}.weight_quantizer" in (path for path, _, _ in weights_and_quantizers(prepared)):
        return _NOT_PER_CHANNEL
    return _NOT_PER_TENSOR if not is_weight and amax.numel() != 1 else _IN_FLOAT
