"""Which convolutions and linear layers run in INT8: their input and their weight are quantized, or neither."""

from __future__ import annotations

from qat.graph.network import Op
from qat.graph.operations import WEIGHTED
from qat.rules.rule import GUIDE, HEURISTICS, MEASURED, PlacementState, Rule, Verdict


class ComputedWeight(Rule):
    """A weight behind weight normalization or standardization has no fixed codes."""

    name = "computed_weight"
    sentence = "a weight that is computed anew at each step is not a constant that could be stored as INT8"
    source = GUIDE

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In float, where the weight is not a constant."""
        return self.keep_float("its weight is computed by other operations") if op.weight is None else None


class TransposedConvolution(Rule):
    """Quantized, it would dequantize its input and compute in float all the same."""

    name = "transposed_convolution"
    sentence = "a transposed convolution has no INT8 kernel"
    source = "what TensorRT-RTX 1.7 builds: tests/test_zoo.py"

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In float, always."""
        return self.keep_float("transposed") if op.kind == "transposed_convolution" else None


class FewChannels(Rule):
    """Below 16 channels in or out, one of the two must be a multiple of 8."""

    name = "few_channels"
    sentence = "a convolution with few channels, none a multiple of 8, has no fast INT8 kernel"
    source = HEURISTICS

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In float, by the numbers of channels; groups have a rule of their own."""
        weight = op.weight
        if weight is None or op.kind == "linear" or weight.groups > 1:
            return None
        few = min(weight.in_channels, weight.out_channels) < 16
        aligned = weight.in_channels % 8 == 0 or weight.out_channels % 8 == 0
        shown = f"{weight.in_channels} -> {weight.out_channels} channels: one is below 16, and neither a multiple of 8"
        return self.keep_float(shown) if few and not aligned else None


class GroupedChannels(Rule):
    """Output channels a multiple of 8, and a kernel of 3 or more."""

    name = "grouped_channels"
    sentence = "a grouped convolution has INT8 kernels for multiples of 8 channels and extents of 3 or more"
    source = HEURISTICS

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In float, where one of the two conditions fails."""
        weight = op.weight
        if weight is None or weight.groups == 1 or (weight.out_channels % 8 == 0 and max(weight.kernel) >= 3):
            return None
        shown = f"grouped, {weight.out_channels} output channels, kernel {max(weight.kernel)}"
        return self.keep_float(f"{shown}: needs a multiple of 8, >= 3")


class GroupedFloatOutput(Rule):
    """Whether somebody reads in float what a grouped convolution makes is known only when all else is decided.

    So qat/rules/place.py asks ``loses`` of a whole placement, and where there are such layers, places anew without
    them.
    """

    name = "grouped_float_output"
    sentence = "a grouped convolution has INT8 kernels only where what it makes is quantized too"
    source = MEASURED

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In float, where an earlier attempt found it so."""
        return self.keep_float("what it makes is read in float") if op.name in state.slow_in_int8 else None

    def loses(self, op: Op, state: PlacementState) -> bool:
        """Whether ``op`` is a quantized grouped convolution that makes a tensor which somebody reads in float."""
        if op.weight is None or op.weight.groups == 1 or not state.is_quantized(op):
            return False
        return not state.is_only_read_quantized(state.written_by(op))


class WeightedInput(Rule):
    """All layers that no other rule keeps in float."""

    name = "weighted_input"
    sentence = "a convolution or linear layer runs in INT8 when its input and its weight are quantized"
    source = GUIDE

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In INT8."""
        return self.quantize(op.inputs[0])


class SharedWeight(Rule):
    """Decided when all layers are: one that stays in float keeps all with the same weight there."""

    name = "shared_weight"
    sentence = "layers that share one weight are quantized together or not at all"
    source = "one tensor is stored once"

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In float, where another layer with the same weight stays there by a rule of its own."""
        if op.weight is None or not state.is_quantized(op):
            return None
        for other in state.network:
            shares = other.kind in WEIGHTED and other.weight is not None and other.weight.tensor == op.weight.tensor
            if shares and not state.is_quantized(other) and state.decisions[other.name].rule != self.name:
                return self.keep_float(f"shares its weight with {other.name}, which stays in float")
        return None
