"""Widens the groups of grouped convolutions with zero channels, to widths that have INT8 kernels.

Groups of 48 channels have no fast INT8 kernel, groups of 64 have one. The convolutions before compute zeros for the 16
channels that each group lacks (weights and bias zero), and those behind ignore them (weights zero), so the network
answers the same. Placement says which widths (qat/rules/weight_rules.py), and qat/rules/channel_regions.py where
channels fit. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export.names import unused_name
from export.onnx_network import DEQUANTIZE, QUANTIZE, WEIGHT, OnnxNetwork, network_from_onnx
from export.qdq import DATA, SCALE
from qat.base.console import warn
from qat.base.errors import UserError
from qat.rules.channel_regions import ChannelRegion, channel_region
from qat.rules.placement import Placement

_PADDED = "padded_groups"  # metadata: {node: the widths that its groups had}
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


def pad_groups(model: ir.Model, placement: Placement) -> dict[str, GroupedAxis]:
    """Pads, in place, the groups that ``placement`` pads; those that do not fit are named in a warning.

    ``placement`` is of this model, or of the one that it was exported from. Returns how the channels of each tensor
    between the convolutions have changed, by its name.
    """
    wanted = {one.label: one.group_widths for one in placement.weights if one.quantized and one.group_widths}
    done = _set_group_widths(model, wanted)
    if left := sorted(done.left):
        warn(
            f"the groups of {', '.join(left[:3])}{' ...' * (len(left) > 3)} could not be padded, and have no fast INT8 "
            f"kernel: leave them in float with --keep-float"
        )
    if done.original:
        model.metadata_props[_PADDED] = json.dumps(done.original)
    return done.tensors


def without_padding(model: ir.Model) -> None:
    """Takes the zero channels out again, in place. Raises UserError when the model says that it has some, wrongly."""
    if (stated := model.metadata_props.pop(_PADDED, None)) is None:
        return
    try:
        widths = {str(label): (int(inside), int(outside)) for label, (inside, outside) in json.loads(stated).items()}
        if left := _set_group_widths(model, widths).left:
            raise ValueError(f"{min(left)} cannot be found")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the padding of its groups cannot be taken out ({error}): export the file again") from error


@dataclass(frozen=True)
class _Resized:
    """How tensors have changed, the widths that layers had, by their labels in the file, and what was not found."""

    tensors: dict[str, GroupedAxis]
    original: dict[str, Widths]
    left: set[str]


def _set_group_widths(model: ir.Model, wanted: Mapping[str, Widths]) -> _Resized:
    """Gives grouped convolutions other widths, in place."""
    if not wanted:
        return _Resized({}, {}, set())
    ShapeInferencePass()(model)  # the exporter leaves some out
    view = network_from_onnx(model)
    changed: dict[str, GroupedAxis] = {}
    original: dict[str, Widths] = {}
    found: set[str] = set()
    for op in view.network:
        weight = op.weight
        if weight is None or op.kind != "convolution" or weight.groups < 2:
            continue
        # A convolution that a function computes has its label in training only as the name of its weight.
        label = next((one for one in (op.label, weight.tensor.removesuffix(".weight")) if one in wanted), None)
        if label is None:
            continue
        axes = [
            GroupedAxis(weight.groups, width, new)
            for width, new in zip(weight.group_widths, wanted[label], strict=True)
        ]
        regions = [channel_region(view.network, tensor) for tensor in (op.inputs[0], op.name)]
        fitting = [one for one in regions if one is not None and _fits(view, one)]
        if len(fitting) < len(regions):
            continue
        for region, axis in zip(fitting, axes, strict=True):
            for name in sorted(region.makers):
                _resize_outputs(view.nodes[name], axis)
            for name in sorted(region.takers):
                own = GroupedAxis(1, axis.width, axis.new) if name == op.name else axis
                _resize_inputs(view.nodes[name], own)
            changed |= {value.name or "": axis for value in _values(view, region)}
        original[op.label] = weight.group_widths
        found.add(label)
    if original:
        for node in model.graph:
            for value in node.outputs:
                if value not in model.graph.outputs:
                    value.shape = None
        ShapeInferencePass()(model)
    return _Resized(changed, original, wanted.keys() - found)


def _fits(view: OnnxNetwork, region: ChannelRegion) -> bool:
    """Whether the constants of the region can be resized: those of its convolutions, which nothing else reads."""
    inside = [view.nodes[name] for name in region.tensors - region.makers]
    scalars = all(value.const_value is None or value.const_value.size == 1 for node in inside for value in _given(node))
    return scalars and all(_weight(view.nodes[name]) is not None for name in region.makers | region.takers)


def _values(view: OnnxNetwork, region: ChannelRegion) -> Iterator[ir.Value]:
    """The tensors of a region, quantized and not."""
    waiting = [view.nodes[name].outputs[0] for name in region.tensors]
    while waiting:
        value = waiting.pop()
        yield value
        waiting += [node.outputs[0] for node in value.consumers() if node.op_type in (QUANTIZE, DEQUANTIZE)]


def _given(node: ir.Node) -> Iterable[ir.Value]:
    return (value for value in node.inputs if value is not None)


def _weight(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Where a convolution's constant weight is, or its codes: node and input; None if it is computed otherwise."""
    value = node.inputs[WEIGHT]
    maker = None if value is None else value.producer()
    at = (maker, DATA) if maker is not None and maker.op_type == DEQUANTIZE else (node, WEIGHT)
    found = at[0].inputs[at[1]]
    return at if found is not None and found.const_value is not None else None


def _resize_outputs(node: ir.Node, axis: GroupedAxis) -> None:
    at = _weight(node)
    assert at is not None, "_fits has seen it"
    _replace(*at, axis, 0)
    if at[0] is not node:
        _replace(at[0], SCALE, axis, 0, fill=1)
        _replace(at[0], _ZERO_POINT, axis, 0)
    _replace(node, _BIAS, axis, 0)


def _resize_inputs(node: ir.Node, axis: GroupedAxis) -> None:
    at = _weight(node)
    assert at is not None, "_fits has seen it"
    _replace(*at, axis, 1)


def _replace(node: ir.Node, index: int, axis: GroupedAxis, along: int, fill: float = 0) -> None:
    """Resizes a constant input of ``node``; one for all channels stays."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None or value.graph is None:
        return
    array = value.const_value.numpy()
    if array.ndim <= along:
        return
    graph = value.graph
    name = value.name or "constant"
    resized = axis.resized(array, along, fill)
    alone = len(value.uses()) == 1
    if alone:
        graph.initializers.pop(name)
    unique = name if alone else unused_name(name, graph.initializers)
    constant = ir.Value(name=unique, type=value.type, shape=ir.Shape(resized.shape), const_value=ir.tensor(resized))
    graph.register_initializer(constant)
    node.replace_input_with(index, constant)
