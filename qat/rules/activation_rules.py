"""Which operations without a weight run in INT8: additions, pools, concatenations, gates, normalizations, products."""

from __future__ import annotations

from abc import abstractmethod

from qat.graph.network import Network, Op
from qat.graph.operations import FUSED_ACTIVATIONS, POOLS
from qat.rules.fusion import broadcasts, stands_alone
from qat.rules.obstacles import OBSTACLES
from qat.rules.rule import BYTES, GUIDE, HEURISTICS, LAYERS, MEASURED, PROFILE, PlacementState, Rule, Verdict


def _is_sum(op: Op) -> bool:
    return op.kind == "add" and len(op.inputs) > 1


def _fuses_into_nothing(op: Op, state: PlacementState) -> bool:
    """Whether no INT8 convolution can take in the sum: no input comes from one, shapes differ, or inputs are equal."""
    odd = broadcasts(state.network, op) or len(set(op.inputs)) < 2
    return odd or not any(map(state.takes_sum, op.inputs))


class ResidualAdd(Rule):
    """All inputs of an addition are quantized except one: the output of the convolution into which the sum fuses.

    That output must stay float between the convolution and the addition.
    """

    name = "residual_add"
    sentence = "one input of a residual addition is quantized, so that the sum fuses into the other input's convolution"
    source = GUIDE

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """INT8, if exactly one input is the output of an INT8 convolution."""
        if not _is_sum(op) or _fuses_into_nothing(op, state):
            return None
        fusing = list(filter(state.takes_sum, op.inputs))
        inside = self.input_in_float(fusing, state.network)
        return None if inside is None else self.quantize(*(t for t in dict.fromkeys(op.inputs) if t != inside))

    def input_in_float(self, fusing: list[str], network: Network) -> str | None:
        """The one of ``fusing``, the outputs of INT8 convolutions, that stays float; None if another rule decides."""
        return fusing[0] if len(fusing) == 1 else None


class ResidualAddOfConvolutions(ResidualAdd):
    """The input that stays float is the one with the longest path from the common ancestor: it is computed last."""

    name = "residual_add_of_convolutions"
    sentence = "if two convolutions are added, the output of the one on the shorter path is quantized"
    source = GUIDE

    def input_in_float(self, fusing: list[str], network: Network) -> str | None:
        """The input with the most layers on the path from the nearest common ancestor."""
        if len(fusing) == 1:
            return None
        common = set.intersection(*(network.ancestors(tensor) for tensor in fusing))
        common -= {name for name in common if network[name].kind == "dropout"}  # dropout is not exported
        nearest = max(common, key=network.position) if common else None
        layers = {tensor: network.most_layers(nearest, tensor) if nearest else 0 for tensor in fusing}
        return max(fusing, key=lambda tensor: (layers[tensor], network.position(tensor)))


class TransformerAdd(Rule):
    """A sum with what a linear layer or a layer normalization made, as at the end of a transformer's blocks."""

    name = "transformer_add"
    sentence = (
        "a sum with the output of a linear layer or a layer normalization stays in float: other sums and "
        "normalizations read it"
    )
    source = GUIDE

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Float for such sums."""
        if not _is_sum(op) or not any(_of_linear(tensor, state.network) for tensor in op.inputs):
            return None
        return self.keep_float("one of its inputs comes from a linear layer or a layer normalization")


def _of_linear(tensor: str, network: Network) -> bool:
    op = network[tensor]
    while op.kind in (*FUSED_ACTIVATIONS, "dropout", "data_movement", "batch_norm"):
        op = network[op.inputs[0]]
    return op.kind in ("linear", "layer_norm")


class ProductOfActivations(Rule):
    """A matrix product without a constant factor that is not one of an attention."""

    name = "product_of_activations"
    sentence = "a product of two activations stays in float"
    source = HEURISTICS

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Float, always."""
        return self.keep_float(self.sentence) if op.kind == "matrix_product" else None


class CodesThroughout(Rule):
    """A rule about operations that should read codes if their output is read as codes; asked from the output back."""

    writes_with_others = False
    """Whether the operation's kernel takes in what follows; then the readers of the combined result count."""

    @abstractmethod
    def applies(self, op: Op, state: PlacementState) -> bool:
        """Whether the rule is about ``op``."""

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """INT8 with all inputs quantized, if an operation after it reads codes."""
        if not self.applies(op, state):
            return None
        written = state.written_by(op) if self.writes_with_others else op.name
        if not state.is_read_quantized(written):
            return self.keep_float("nothing after it reads INT8")
        return self.quantize(*op.inputs)


class PoolInput(CodesThroughout):
    """Average pooling computes new values. Max pooling commutes with quantization and needs no rule."""

    name = "pool_input"
    sentence = "an average pool runs in INT8 when its input and its output are quantized"
    source = GUIDE
    cost = "the pool runs in FP16 between INT8 layers"

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Average and global pools."""
        return op.kind in POOLS


class SharedConcatScale(CodesThroughout):
    """A concatenation of codes. qat/rules/scale_groups.py gives all its tensors one scale."""

    name = "shared_concat_scale"
    sentence = "all inputs of a concatenation share the scale of its output, so that it copies codes"
    source = GUIDE

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Concatenations."""
        return op.kind == "concat"


class GateProduct(CodesThroughout):
    """A tensor times a function of its own global pool (squeeze-and-excitation). Both factors are quantized."""

    name = "gate_product"
    sentence = "a gate multiplies INT8 codes, so that the convolutions before and after it write and read codes"
    source = MEASURED
    cost = "the gate multiplies in FP16, so the convolutions around it write and read FP16"

    writes_with_others = True

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Products that are gates."""
        return op.name in state.gates


class UnfusedAdd(CodesThroughout):
    """An addition that no INT8 convolution can take in, see ``_fuses_into_nothing``."""

    name = "unfused_add"
    sentence = "an addition that no convolution can take in reads and writes INT8 codes"
    source = BYTES
    cost = "the addition, which does not fuse into a convolution, reads FP16"
    writes_with_others = True

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Additions of two or more tensors that fuse into nothing."""
        return _is_sum(op) and _fuses_into_nothing(op, state)


class SumOfGate(UnfusedAdd):
    """A sum of a gate's product, which nothing else reads, and codes: one kernel multiplies and adds codes.

    With codes between product and sum, a network of such blocks took 1.573 ms, without them 1.492 (FP16 1.913; H200,
    TensorRT 8.6.0, 2026-12-01).
    """

    name = "sum_of_gate"
    sentence = "a sum takes in the product of a gate, which multiplies codes, and reads codes otherwise"
    source = LAYERS
    cost = ""

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Such sums with a gate's product."""
        return super().applies(op, state) and self._product(op, state) is not None

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """INT8 with all inputs but the product quantized, if an operation after it reads codes."""
        verdict = super().decide(op, state)
        if verdict is None or not verdict.quantized:
            return verdict
        return self.quantize(*(tensor for tensor in op.inputs if tensor != self._product(op, state)))

    def _product(self, op: Op, state: PlacementState) -> str | None:
        """The input that is a gate's product, or that times a number; None if there is none, or there are two."""
        found = [tensor for tensor in op.inputs if self._only_behind_gate(tensor, state)]
        return found[0] if len(found) == 1 else None

    def _only_behind_gate(self, tensor: str, state: PlacementState) -> bool:
        network = state.network
        while len(network.readers(tensor)) == 1 and tensor not in state.gates and _is_pointwise(network[tensor]):
            tensor = network[tensor].inputs[0]
        return tensor in state.gates and len(network.readers(tensor)) == 1


def _is_pointwise(op: Op) -> bool:
    return op.kind in (*FUSED_ACTIVATIONS, "dropout") and len(op.inputs) == 1


class UnfusedNorm(CodesThroughout):
    """A batch normalization that does not fold into a convolution. Its kernel, with the activation, is memory-bound."""

    name = "unfused_norm"
    sentence = "a stand-alone normalization reads INT8 codes if it writes them"
    source = MEASURED
    cost = "the normalization and whatever makes its input run in FP16 or FP32"
    writes_with_others = True

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Stand-alone normalizations."""
        return stands_alone(state.network, op)


class UnfusedActivation(CodesThroughout):
    """An activation that INT8 convolutions cannot take in: both its input and its output are quantized."""

    name = "unfused_activation"
    sentence = "an activation that needs its own kernel reads and writes INT8 codes"
    source = MEASURED
    cost = "the activation's kernel reads FP16"

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Such activations right after an INT8 convolution."""
        return op.kind == "unfused_activation" and state.fusing_convolution(op.inputs[0]) is not None


class SwishOfCodes(CodesThroughout):
    """A swish behind a layer for which there is no INT8 kernel that takes it in.

    TensorRT 8.6 computes both in one kernel all the same, and converts an image of 3 channels to 32 for it: with 64
    output channels at 640 pixels that takes 1.9 times as long as two kernels with codes between them.
    """

    name = "swish_of_codes"
    sentence = "a swish reads INT8 codes where its layer's kernels do not take it in"
    source = PROFILE
    cost = "the layer and its swish are one kernel, which needs another layout of the layer's input"

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Each swish right after a convolution for which a profile says that."""
        made = state.fusing_convolution(op.inputs[0]) if op.kind == "swish" else None
        weight = None if made is None else state.network[made].weight
        return weight is not None and state.profile.swish_of_codes(weight) is not None


class SwishOfSum(CodesThroughout):
    """A swish behind a residual sum: the INT8 kernels of a convolution take in the sum, and a ReLU, but no swish.

    In blocks that begin with one the convolution wrote FP16 (41 us, with INT8 about 20), the other input was converted
    to FP16 (50 us), and a third kernel added and computed the swish (57 us; H200, TensorRT 8.6.0, 2026-12-01).
    """

    name = "swish_of_sum"
    sentence = "a swish reads the INT8 codes of the residual sum before it: no kernel takes in both"
    source = LAYERS
    cost = "the convolution and the other input of the sum are written in FP16 for a kernel that adds"
    writes_with_others = True

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Each swish that alone reads a sum which fuses into a convolution."""
        made = state.network[op.inputs[0]] if op.kind == "swish" else None
        if made is None or not (_is_sum(made) and state.is_quantized(made)):
            return False
        inside = [tensor for tensor in made.inputs if (made.name, tensor) not in state.reads]
        return len(state.network.readers(made.name)) == 1 and any(map(state.takes_sum, inside))


class AsCodesToo(Rule):
    """A rule about an operation whose input all other readers read as codes: it does so too.

    Asked when all other operations are decided.
    """

    @abstractmethod
    def applies(self, op: Op, state: PlacementState) -> bool:
        """Whether the rule is about ``op``."""

    @abstractmethod
    def is_alike(self, reader: Op) -> bool:
        """Whether another reader of the input is one that these rules are about, too, and so does not count."""

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """INT8, unless it already reads codes, or not all others do."""
        if not self.applies(op, state) or (op.name, op.inputs[0]) in state.reads:
            return None
        if any(obstacle.reason(op, op.inputs, state) for obstacle in OBSTACLES):
            return None
        others = [reader for reader in state.network.readers(op.inputs[0]) if not self.is_alike(reader)]
        read_codes = bool(others) and all((reader.name, op.inputs[0]) in state.reads for reader in others)
        return self.quantize(op.inputs[0]) if read_codes else None


class ActivationOfCodes(AsCodesToo):
    """An activation of a sum that all other readers read as codes, as in residual blocks that begin with one.

    With a swish each such sum was written in FP16 and as codes, by kernels of their own (30 us for the codes, 20 for
    the activation, 30 to convert the codes back; H200, TensorRT 8.6.0, 2026-12-01).
    """

    name = "activation_of_codes"
    sentence = "an activation of a sum reads the codes that all others read of it, so that no float copy is written"
    source = LAYERS

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Activations of sums whose result is read as codes alone."""
        if op.kind not in FUSED_ACTIVATIONS or len(op.inputs) != 1 or not _is_sum(state.network[op.inputs[0]]):
            return False
        return state.is_only_read_quantized(state.written_by(op))

    def is_alike(self, reader: Op) -> bool:
        """Activations."""
        return reader.kind in FUSED_ACTIVATIONS


class NormOfCodes(AsCodesToo):
    """A batch normalization that does not fold into a convolution and whose input all other readers read as codes."""

    name = "norm_of_codes"
    sentence = (
        "a stand-alone normalization reads the codes that all other readers read, so that no float copy is written"
    )
    source = BYTES

    def applies(self, op: Op, state: PlacementState) -> bool:
        """Stand-alone normalizations."""
        return stands_alone(state.network, op)

    def is_alike(self, reader: Op) -> bool:
        """Normalizations."""
        return reader.kind == "batch_norm"
