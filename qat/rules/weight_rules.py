"""Which convolutions and linear layers run in INT8. The input and the weight are both quantized, or neither is."""

from __future__ import annotations

from qat.graph.data_movement import source_of
from qat.graph.network import Op
from qat.graph.operations import WEIGHTED
from qat.rules.channel_regions import channel_region
from qat.rules.rule import GUIDE, HEURISTICS, PROFILE, PlacementState, Rule, Verdict


class ComputedWeight(Rule):
    """A weight that is computed, as by weight normalization or standardization, has no fixed codes."""

    name = "computed_weight"
    sentence = "a weight that is computed at each step is not a constant, so it cannot be stored as INT8"
    source = GUIDE

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Float, if the weight is not a constant."""
        return self.keep_float("its weight is computed by other operations") if op.weight is None else None


class WeighsSoftmax(Rule):
    """A layer of one output that reads a softmax computes an expectation, such as the sides of a detector's boxes.

    With 16 bins, as in the YOLOs, 8 bits of the softmax move that by 0.08 bins, at stride 32 by 2.6 pixels
    (standard deviation over random shares). A yolov8n lost 0.8 points of mAP50-95 by it (benchmarks/detection.txt).
    """

    name = "weighs_softmax"
    sentence = "a layer of one output whose input is a softmax stays in float: it decodes the answer"
    source = "the rounding of each share is multiplied by a constant weight, up to the number of bins"

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Float, if it has one output channel and its input comes from a softmax, moved or not."""
        source = state.network[source_of(state.network, op.inputs[0])]
        one = op.weight is not None and op.weight.out_channels == 1
        is_softmax = source.kind in ("softmax", "softmax_across")
        return self.keep_float("it weighs the output of a softmax") if one and is_softmax else None


class TransposedConvolution(Rule):
    """Those with a known INT8 kernel are left to the other rules. Their weight has one scale: TensorRT takes no more.

    It takes the scale only as a vector: of one value for each input channel (8.4 to 10.0) or each output channel (10.2
    and later). Equal values suit both.
    """

    name = "transposed_convolution"
    sentence = (
        "a transposed convolution runs in INT8 where one of its extents and strides was measured to gain, if it is not "
        "grouped and its channels are multiples of 8"
    )
    source = PROFILE

    about_kernels = True

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Float, if no such layer was measured to gain."""
        weight = op.weight
        if op.kind != "transposed_convolution" or weight is None:
            return None
        if weight.groups > 1:
            return self.keep_float("no INT8 kernel is known for a grouped transposed convolution")
        if weight.in_channels % 8 or weight.out_channels % 8:
            shown = f"{weight.in_channels} -> {weight.out_channels} channels"
            return self.keep_float(f"transposed, {shown}: both must be multiples of 8")
        found = state.profile.like("transposed_convolution", weight)
        if found is None:
            extent, stride = ("x".join(map(str, sizes)) for sizes in (weight.kernel, weight.stride))
            return self.keep_float(
                f"no transposed convolution of extent {extent}, stride {stride} was measured in INT8"
            )
        if found.gains and weight.in_channels <= found.kind.in_channels:  # wider ones gain less and less
            return None
        if found.gains:
            return self.keep_float(f"wider than {found.kind}: {found.outcome} ({state.profile})")
        return self.keep_float(f"like {found.kind}: {found.outcome} ({state.profile})")


class FewChannels(Rule):
    """If there are fewer than 16 input or output channels, one of the two numbers must be a multiple of 8."""

    name = "few_channels"
    sentence = "a convolution with few channels, neither number a multiple of 8, has no fast INT8 kernel"
    source = HEURISTICS

    about_kernels = True

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Float, depending on the numbers of channels; grouped convolutions have their own rule."""
        weight = op.weight
        if weight is None or op.kind == "linear" or weight.groups > 1:
            return None
        few = min(weight.in_channels, weight.out_channels) < 16
        aligned = weight.in_channels % 8 == 0 or weight.out_channels % 8 == 0
        shown = f"{weight.in_channels} -> {weight.out_channels} channels: one is below 16, neither is a multiple of 8"
        return self.keep_float(shown) if few and not aligned else None


class MeasuredLoss(Rule):
    """A layer like this one was measured, and was slower in INT8."""

    name = "measured_loss"
    sentence = "a layer like this one was measured to be slower in INT8"
    source = PROFILE

    about_kernels = True

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Float, if such a layer was measured, and loses; grouped and transposed ones have their own rules."""
        weight = op.weight
        if weight is None or op.kind == "transposed_convolution" or (weight.groups > 1 and not weight.is_depthwise):
            return None
        found = state.profile.like("linear" if op.kind == "linear" else "convolution", weight)
        if found is None or not found.loses:
            return None
        return self.keep_float(f"like {found.kind}: {found.outcome} ({state.profile})")


class GroupedChannels(Rule):
    """A grouped convolution needs a width that has a kernel, output channels in a multiple of 8, and an extent of 3.

    The width is the number of channels in a group. Depthwise convolutions have kernels of their own, for multiples of 2
    channels. Widths without one are padded with zero channels to the next that has one (export/pad_groups.py), where
    that changes nothing but the convolutions before and behind.
    """

    name = "grouped_channels"
    sentence = (
        "a grouped convolution has fast INT8 kernels only if it is depthwise or its groups are 4, 8, 16 or a multiple "
        "of 32 channels wide, for multiples of 8 channels (depthwise: 2) and extents of at least 3; others are padded"
    )
    source = PROFILE

    about_kernels = True

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Float, if one of the conditions fails; INT8 with groups to be padded."""
        weight = op.weight
        if weight is None or weight.groups == 1:
            return None
        widths = inside, outside = weight.group_widths
        fast = widths if weight.is_depthwise else tuple(map(state.profile.fast_group_width, widths))
        outputs = weight.groups * (fast[1] or outside)
        multiple = 2 if weight.is_depthwise else 8
        if max(weight.kernel) < 3 or outputs % multiple:
            shown = f"grouped, {outputs} output channels, kernel {max(weight.kernel)}"
            return self.keep_float(f"{shown}: must be a multiple of {multiple}, and at least 3")
        if fast == widths:
            return None
        shown = f"grouped, {_both(widths)} channels in a group"
        slow = next(width for width, other in zip(widths, fast, strict=True) if width != other)
        if measured := state.profile.of_group_width(slow, weight.stride[0]):
            shown += f", {measured.outcome}{f' with {slow}' * (inside != outside)} ({state.profile})"
        if fast[0] is None or fast[1] is None:
            return self.keep_float(f"{shown}: no width of up to 1.6 times as many channels has a fast INT8 kernel")
        if not all(channel_region(state.network, tensor) for tensor in (op.inputs[0], op.name)):
            return self.keep_float(f"{shown}, and zero channels do not fit between it and its neighbours")
        padded = (fast[0], fast[1])
        return Verdict(self.name, True, op.inputs[:1], f"{shown}, padded to {_both(padded)}", padded)


def _both(widths: tuple[int, int]) -> str:
    return " -> ".join(map(str, dict.fromkeys(widths)))


class WeightedInput(Rule):
    """All remaining layers, which no other rule keeps in float."""

    name = "weighted_input"
    sentence = "a convolution or linear layer runs in INT8 when its input and its weight are quantized"
    source = GUIDE

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """INT8, always."""
        return self.quantize(op.inputs[0])


class SharedWeight(Rule):
    """Decided after all layers: a layer that stays in float keeps all others with the same weight in float."""

    name = "shared_weight"
    sentence = "layers that share one weight are quantized together or not at all"
    source = "a weight is stored once"

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Float, if another rule keeps another layer with the same weight in float."""
        if op.weight is None or not state.is_quantized(op):
            return None
        for other in state.network:
            shares = other.kind in WEIGHTED and other.weight is not None and other.weight.tensor == op.weight.tensor
            if shares and not state.is_quantized(other) and state.decisions[other.name].rule != self.name:
                return self.keep_float(f"shares its weight with {other.name}, which stays in float")
        return None
