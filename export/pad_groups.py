"""Widens the groups of grouped convolutions with zero channels, to widths that have INT8 kernels.

Groups of 48 channels have no fast INT8 kernel, groups of 64 have one. The convolutions before compute zeros for the 16
channels that each group lacks (weights and bias zero), and those behind ignore them (weights zero), so the network
answers the same. Placement says which widths (qat/rules/weight_rules.py), and qat/rules/channel_regions.py where
channels fit. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export.names import all_names, unused_name
from export.onnx_network import DEQUANTIZE, QUANTIZE, WEIGHT, OnnxNetwork, constant, network_from_onnx
from export.qdq import DATA, SCALE
from qat.base import own_json
from qat.base.console import say, warn
from qat.base.errors import UserError
from qat.base.schema.leaves import Size
from qat.rules.channel_regions import ChannelRegion, channel_region
from qat.rules.placement import Placement

_PADDED = "padded_groups"  # metadata: {tensor that the convolution makes: the widths that its groups had}
_BIAS, _ZERO_POINT = 2, 2
Widths = tuple[int, int]
"""Input and output channels of a group."""


@dataclass(frozen=True)
class GroupedAxis:
    """An axis of ``groups`` groups of ``width`` channels each, which become ``new`` channels each."""

    groups: int
    width: int
    new: int

    def resized(self, values: np.ndarray, axis: int, fill: float = 0) -> np.ndarray:
        """``values`` with the groups of this axis filled up, or cut off."""
        parts = np.moveaxis(values, axis, 0).reshape(self.groups, self.width, -1)[:, : self.new]
        parts = np.pad(parts, ((0, 0), (0, self.new - parts.shape[1]), (0, 0)), constant_values=fill)
        others = values.shape[:axis] + values.shape[axis + 1 :]
        return np.ascontiguousarray(np.moveaxis(parts.reshape(-1, *others), 0, axis))

    @property
    def back(self) -> GroupedAxis:
        """The inverse."""
        return GroupedAxis(self.groups, self.new, self.width)


def pad_groups(model: ir.Model, placement: Placement, paths: Mapping[str, str] | None = None) -> dict[str, GroupedAxis]:
    """Pads, in place, the groups that ``placement`` pads; those that do not fit are named in a warning.

    Args:
        model: the Q/DQ network.
        placement: of this network, or of the PyTorch network that it was exported from.
        paths: for the latter: the module whose weight each of its operations reads (export.fold.layer_paths).

    Returns how the channels of each tensor between the convolutions have changed, by its name.
    """
    padding = [one for one in placement.weights if one.quantized and one.group_widths]
    labels = {one.op: one.label for one in padding}
    names = {op: op for op in labels}
    if padding and paths is not None:
        of_weight = {op.weight.tensor: op.name for op in network_from_onnx(model).network if op.weight is not None}
        names = {op: of_weight.get(f"{paths.get(op)}.weight", "") for op in labels}
    done = set_group_widths(
        model, {names[one.op]: one.group_widths for one in padding if one.group_widths and names[one.op]}
    )
    if left := [labels[op] for op in labels if names[op] not in done.original]:
        warn(
            f"the groups of {', '.join(left[:3])}{' ...' * (len(left) > 3)} could not be padded, and have no fast INT8 "
            "kernel: leave out --merge-shortcuts if it is given, else quantize with these in float (--keep-float)"
        )
    if padded := [labels[op] for op in labels if names[op] in done.original]:
        say(f"groups padded with zero channels: {', '.join(padded[:3])}{' ...' * (len(padded) > 3)} ({len(padded)})")
    return done.tensors


def without_padding(model: ir.Model) -> dict[str, Widths]:
    """Takes the zero channels out again, in place. Returns the widths of the padded layers, by the tensor they make.

    Raises UserError when the model says that it has some, wrongly.
    """
    if (stated := model.metadata_props.pop(_PADDED, None)) is None:
        return {}
    try:
        widths = own_json.typed(own_json.parse(stated), dict[str, tuple[Size, Size]])
        done = _resize_groups(model, widths)
        if missing := widths.keys() - done.original.keys():
            raise ValueError(f"{min(missing)} cannot be found")
        return done.original
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the padding of its groups cannot be taken out ({error}): export the file again") from error


@dataclass(frozen=True)
class Resized:
    """How tensors have changed, and the widths that layers had, by the tensors that they make."""

    tensors: dict[str, GroupedAxis]
    original: dict[str, Widths]


def set_group_widths(model: ir.Model, wanted: Mapping[str, Widths]) -> Resized:
    """Pads grouped convolutions, in place, to widths by the tensors that they make. Those that do not fit are left."""
    done = _resize_groups(model, wanted, only_wider=True)
    if done.original:
        model.metadata_props[_PADDED] = json.dumps(done.original)
    return done


def _resize_groups(model: ir.Model, wanted: Mapping[str, Widths], *, only_wider: bool = False) -> Resized:
    """Gives grouped convolutions other widths, in place."""
    if not wanted:
        return Resized({}, {})
    ShapeInferencePass()(model)  # the exporter leaves some out
    view = network_from_onnx(model)
    writer = _Writer(model.graph)
    changed: dict[str, GroupedAxis] = {}
    original: dict[str, Widths] = {}
    for op in view.network:
        weight = op.weight
        if weight is None or op.kind != "convolution" or weight.groups < 2 or op.name not in wanted:
            continue
        pairs = list(zip(weight.group_widths, wanted[op.name], strict=True))
        if only_wider and any(new < width for width, new in pairs):
            continue
        axes = [GroupedAxis(weight.groups, width, new) for width, new in pairs]
        regions = [channel_region(view.network, tensor) for tensor in (op.inputs[0], op.name)]
        fitting = [one for one in regions if one is not None and _fits(view, one)]
        if len(fitting) < len(regions):
            continue
        for region, axis in zip(fitting, axes, strict=True):
            for name in sorted(region.makers):
                writer.resize_outputs(view.nodes[name], axis)
            for name in sorted(region.takers):
                own = GroupedAxis(1, axis.width, axis.new) if name == op.name else axis
                writer.resize_inputs(view.nodes[name], own)
            changed |= {value.name or "": axis for value in _values(view, region)}
        original[op.name] = weight.group_widths
    if original:
        for node in model.graph:
            for value in node.outputs:
                if value not in model.graph.outputs:
                    value.shape = None
        ShapeInferencePass()(model)
    return Resized(changed, original)


def _fits(view: OnnxNetwork, region: ChannelRegion) -> bool:
    """Whether all constants of the region are initializers that can be resized, or one value for all channels."""
    inside = [view.nodes[name] for name in region.tensors - region.makers]
    scalars = all(array is None or array.size == 1 for node in inside for array in map(constant, node.inputs))
    return scalars and all(_parts(view.nodes[name]) is not None for name in region.makers | region.takers)


def _values(view: OnnxNetwork, region: ChannelRegion) -> Iterator[ir.Value]:
    """The tensors of a region, quantized and not."""
    waiting = [view.nodes[name].outputs[0] for name in region.tensors]
    while waiting:
        value = waiting.pop()
        yield value
        waiting += [node.outputs[0] for node in value.consumers() if node.op_type in (QUANTIZE, DEQUANTIZE)]


def _parts(node: ir.Node) -> list[tuple[ir.Node, int]] | None:
    """The constants that state a convolution's output channels along their first axis: (node, input), the weight first.

    A scale that serves all channels is left out. None if one of the others is not an initializer of the right extent.
    """
    quantizers: list[ir.Node] = []  # from the convolution to the constant
    at, index = node, WEIGHT
    while (value := at.inputs[index]) is not None and (maker := value.producer()) is not None:
        if maker.op_type not in (QUANTIZE, DEQUANTIZE):
            return None
        quantizers.append(maker)
        at, index = maker, DATA
    found = [(at, index)]
    channels = _extent(at, index)
    if channels is None:
        return None
    others = [(one, place) for one in quantizers for place in (SCALE, _ZERO_POINT)] + [(node, _BIAS)]
    for one, place in others:
        if place >= len(one.inputs) or one.inputs[place] is None or _is_single(one, place):
            continue
        if _extent(one, place) != channels:
            return None
        found.append((one, place))
    return found


def _extent(node: ir.Node, index: int) -> int | None:
    """The first extent of an initializer that ``node`` reads; None of anything else."""
    value = node.inputs[index]
    if value is None or value.const_value is None or value.graph is None or value.producer() is not None:
        return None
    shape = value.const_value.numpy().shape
    return shape[0] if shape else None


def _is_single(node: ir.Node, index: int) -> bool:
    """Whether a scale or zero point is one value for all channels."""
    array = constant(node.inputs[index])
    return index != _BIAS and array is not None and array.size == 1


class _Writer:
    """Replaces initializers of a graph by resized ones."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._taken = graph, all_names(graph)

    def resize_outputs(self, node: ir.Node, axis: GroupedAxis) -> None:
        """Resizes everything that states the output channels of a convolution."""
        for one, index in _parts(node) or ():
            is_scale = index == SCALE and one is not node
            self._replace(one, index, axis, along=0, fill=1 if is_scale else 0)

    def resize_inputs(self, node: ir.Node, axis: GroupedAxis) -> None:
        """Resizes the input channels of a convolution's weight."""
        for one, index in (_parts(node) or ())[:1]:
            self._replace(one, index, axis, along=1)

    def _replace(self, node: ir.Node, index: int, axis: GroupedAxis, along: int, fill: float = 0) -> None:
        value = node.inputs[index]
        assert value is not None
        assert value.const_value is not None
        resized = axis.resized(value.const_value.numpy(), along, fill)
        name = value.name or "constant"
        if len(value.uses()) == 1:
            self._graph.initializers.pop(name)
        else:
            name = unused_name(name, self._taken)
            self._taken.add(name)
        new = ir.Value(name=name, type=value.type, shape=ir.Shape(resized.shape), const_value=ir.tensor(resized))
        self._graph.register_initializer(new)
        node.replace_input_with(index, new)
