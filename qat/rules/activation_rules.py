"""Which operations without a weight read codes: additions, pools, concatenations, gates, normalizations, products."""

from __future__ import annotations

from abc import abstractmethod

from qat.graph.network import Network, Op
from qat.graph.operations import POOLS
from qat.rules.fusion import broadcasts, gate_products, stands_alone
from qat.rules.obstacles import OBSTACLES
from qat.rules.rule import BYTES, GUIDE, HEURISTICS, MEASURED, PlacementState, Rule, Verdict


def _is_sum(op: Op) -> bool:
    return op.kind == "add" and len(op.inputs) > 1


def _fuses_into_nothing(op: Op, state: PlacementState) -> bool:
    """Whether no INT8 convolution can take the sum in: inputs differ in shape, are the same, or come from elsewhere."""
    odd = broadcasts(state.network, op) or len(set(op.inputs)) < 2
    return odd or not any(state.fusing_convolution(tensor) for tensor in op.inputs)


class ResidualAdd(Rule):
    """All inputs of an addition are quantized but one: the one whose convolution can take the sum in.

    That convolution's own output must stay float between it and the addition.
    """

    name = "residual_add"
    sentence = "one input of a residual addition is quantized, so that it fuses into the other's convolution"
    source = GUIDE

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In INT8, where exactly one input is the result of an INT8 convolution."""
        if not _is_sum(op) or _fuses_into_nothing(op, state):
            return None
        fusing = [tensor for tensor in op.inputs if state.fusing_convolution(tensor)]
        inside = self.input_in_float(fusing, state.network)
        return None if inside is None else self.quantize(*(t for t in dict.fromkeys(op.inputs) if t != inside))

    def input_in_float(self, fusing: list[str], network: Network) -> str | None:
        """The input that stays float, of those that INT8 convolutions made; None where another rule chooses."""
        return fusing[0] if len(fusing) == 1 else None


class ResidualAddOfConvolutions(ResidualAdd):
    """The input that stays float is on the longest path from the common ancestor, so that it is computed last."""

    name = "residual_add_of_convolutions"
    sentence = "of two convolutions that are added, the one on the shorter path is quantized"
    source = GUIDE

    def input_in_float(self, fusing: list[str], network: Network) -> str | None:
        """Chosen by the number of layers on the way."""
        if len(fusing) == 1:
            return None
        common = set.intersection(*(network.ancestors(tensor) for tensor in fusing))
        common -= {name for name in common if network[name].kind == "dropout"}  # which is not exported
        nearest = max(common, key=network.position) if common else None
        layers = {tensor: network.most_layers(nearest, tensor) if nearest else 0 for tensor in fusing}
        return max(fusing, key=lambda tensor: (layers[tensor], network.position(tensor)))


class ProductOfActivations(Rule):
    """No constant factor, so no weight."""

    name = "product_of_activations"
    sentence = "a product of two activations stays in float"
    source = HEURISTICS

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In float, always."""
        return self.keep_float(self.sentence) if op.kind == "matrix_product" else None


class CodesThroughout(Rule):
    """A rule about operations that read codes wherever what they make is read as codes; asked from the output on."""

    writes_with_others = False
    """Whether its kernel takes in what follows, so that it is asked who reads the result of all of it."""

    @abstractmethod
    def applies(self, op: Op, state: PlacementState) -> bool:
        """Whether ``op`` is what the rule is about."""

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In INT8 with all inputs quantized, if somebody behind it reads codes."""
        if not self.applies(op, state):
            return None
        written = state.written_by(op) if self.writes_with_others else op.name
        if not state.is_read_quantized(written):
            return self.keep_float("nothing behind it reads INT8")
        return self.quantize(*op.inputs)


class PoolInput(CodesThroughout):
    """Max pooling commutes with quantization and needs nothing."""

    name = "pool_input"
    sentence = "an average pool runs in INT8 when its input and its output are quantized"
    source = GUIDE
    cost = "the pool runs in FP16 between INT8 layers"

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Average and global pools."""
        return op.kind in POOLS


class SharedConcatScale(CodesThroughout):
    """The one scale for all is given by qat/rules/scale_groups.py."""

    name = "shared_concat_scale"
    sentence = "all inputs of a concatenation share the scale of its output, so that it copies codes"
    source = GUIDE

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Concatenations."""
        return op.kind == "concat"


class GateProduct(CodesThroughout):
    """A tensor times a function of its own global pool: squeeze-and-excite. Both factors are quantized."""

    name = "gate_product"
    sentence = "a gate multiplies INT8 codes, so that the convolutions on both sides of it write and read them"
    source = MEASURED
    cost = "the gate multiplies in FP16, so the convolutions around it write and read FP16"

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Products that are gates."""
        return op.name in gate_products(state.network)


class UnfusedAdd(CodesThroughout):
    """Of tensors none of which an INT8 convolution has just made, or that differ in shape, or are the same."""

    name = "unfused_add"
    sentence = "an addition that no convolution can take in reads and writes INT8 codes"
    source = BYTES
    cost = "the addition, which fuses into no convolution, reads FP16"
    writes_with_others = True

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Additions of two tensors or more that fuse into nothing."""
        return _is_sum(op) and _fuses_into_nothing(op, state)


class UnfusedNorm(CodesThroughout):
    """A batch normalization that folds into no convolution: its kernel, with the activation, is bound by memory."""

    name = "unfused_norm"
    sentence = "a normalization that stands alone reads INT8 codes where it writes them"
    source = MEASURED
    cost = "the normalization and whatever makes its input run in FP16 or FP32"
    writes_with_others = True

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Normalizations that stand alone."""
        return stands_alone(state.network, op)


class UnfusedActivation(CodesThroughout):
    """Between INT8 convolutions that do not take it in, its input is quantized as well as its output."""

    name = "unfused_activation"
    sentence = "an activation that takes a kernel of its own reads and writes INT8 codes"
    source = MEASURED
    cost = "the activation's kernel reads FP16"

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Such activations behind an INT8 convolution."""
        return op.kind == "unfused_activation" and state.fusing_convolution(op.inputs[0]) is not None


class NormOfCodes(Rule):
    """A batch normalization that folds into no convolution, beside readers of the same tensor that all read codes."""

    name = "norm_of_codes"
    sentence = (
        "a normalization that stands alone reads the codes that all others read, so that no float copy is written"
    )
    source = BYTES

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """In INT8, unless it reads codes already; asked when all others are decided."""
        if not stands_alone(state.network, op) or (op.name, op.inputs[0]) in state.reads:
            return None
        if any(obstacle.reason(op, op.inputs, state) for obstacle in OBSTACLES):
            return None
        others = [reader for reader in state.network.readers(op.inputs[0]) if reader.kind != "batch_norm"]
        read_codes = bool(others) and all((reader.name, op.inputs[0]) in state.reads for reader in others)
        return self.quantize(op.inputs[0]) if read_codes else None
