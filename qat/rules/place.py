"""Decides where quantizers go: TensorRT's rules for Q/DQ nodes, applied in order to the neutral view of a network.

A wrong placement still builds, but can be slower than FP16, because TensorRT fuses a convolution with what follows only
if the Q/DQ nodes allow it. Each rule is one object (qat/rules/weight_rules.py, activation_rules.py, obstacles.py). This
module defines the order in which they are asked:

1. Every convolution and linear layer: the first rule that answers decides. Then layers that share a weight are made
   alike.
2. Additions and products of activations. Their rules depend on which layers run in INT8.
3. From the output to the input, operations that should read codes if their own output is read as codes. The readers of
   that output are decided already.
4. Activations and normalizations whose input other operations read as codes.

An obstacle may stop any read that a rule asks for. If quantized tensors differ only by data movement,
qat/rules/scale_groups.py gives them one scale and one quantizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from qat.graph.network import Network, Op
from qat.graph.operations import WEIGHTED
from qat.rules.activation_rules import (
    ActivationOfCodes,
    GateProduct,
    NormOfCodes,
    PoolInput,
    ProductOfActivations,
    ResidualAdd,
    ResidualAddOfConvolutions,
    SharedConcatScale,
    SumOfGate,
    SwishOfCodes,
    SwishOfSum,
    TransformerAdd,
    UnfusedActivation,
    UnfusedAdd,
    UnfusedNorm,
)
from qat.rules.attention_rules import AttentionProduct
from qat.rules.keep_float import KeepFloat
from qat.rules.kernel_profile import KernelProfile
from qat.rules.neighbour_rules import BesideFloatGroups, GroupedFloatOutput
from qat.rules.obstacles import OBSTACLES
from qat.rules.placement import Placement
from qat.rules.rule import PlacementState, Rule, Verdict
from qat.rules.scale_groups import ONE_QUANTIZER, share_scales
from qat.rules.weight_rules import (
    ComputedWeight,
    FewChannels,
    GroupedChannels,
    MeasuredLoss,
    SharedWeight,
    TransposedConvolution,
    WeighsSoftmax,
    WeightedInput,
)

_NEIGHBOUR_RULES = (GroupedFloatOutput(), BesideFloatGroups())


@dataclass(frozen=True)
class Pass:
    """Rules that are asked about one operation after another; the first rule that answers decides."""

    rules: tuple[Rule, ...]
    only_weighted: bool = False
    backward: bool = False

    def run(self, state: PlacementState) -> None:
        """Asks the rules about every operation and applies their verdicts."""
        for op in reversed(state.network) if self.backward else state.network:
            if op.kind in WEIGHTED or not self.only_weighted:
                asked = (rule for rule in self.rules if not (rule.about_kernels and op.name in state.quantizable))
                answers = (rule.decide(op, state) for rule in asked)
                if (verdict := next((answer for answer in answers if answer is not None), None)) is not None:
                    state.record(op, _unless_stopped(verdict, op, state))


PASSES = (
    Pass(
        (
            *OBSTACLES,
            ComputedWeight(),
            WeighsSoftmax(),
            TransposedConvolution(),
            MeasuredLoss(),
            FewChannels(),
            *_NEIGHBOUR_RULES,
            GroupedChannels(),
            WeightedInput(),
        ),
        only_weighted=True,
    ),
    Pass((SharedWeight(),), only_weighted=True),
    Pass((ResidualAdd(), ResidualAddOfConvolutions(), AttentionProduct(), ProductOfActivations())),
    Pass(
        (
            PoolInput(),
            SharedConcatScale(),
            GateProduct(),
            TransformerAdd(),
            SumOfGate(),
            UnfusedAdd(),
            UnfusedNorm(),
            UnfusedActivation(),
            SwishOfCodes(),
            SwishOfSum(),
        ),
        backward=True,
    ),
    Pass((ActivationOfCodes(), NormOfCodes())),
)
RULES: dict[str, Rule] = {rule.name: rule for one in PASSES for rule in one.rules} | {ONE_QUANTIZER.name: ONE_QUANTIZER}
"""All rules by name."""


def place(
    network: Network,
    keep_float: Iterable[str] = (),
    unknown: Iterable[str] = (),
    profile: KernelProfile | None = None,
    quantizable: Collection[str] = (),
) -> Placement:
    """Applies the rules to ``network``.

    Args:
        network: the neutral view of a float network.
        keep_float: patterns of operations and tensors that stay in float, as ``fnmatch`` takes them. Each is compared
            with names and labels, and a module's path stands for everything inside it. A matched convolution, linear
            layer, addition, pool, product, concatenation or stand-alone normalization computes in float. Any other
            operation is matched only by its exact name or label, and then its output is not quantized.
        unknown: tensors whose range is not known, so that they cannot be quantized.
        profile: what was measured on a GPU (deploy.kernels); None for what comes with the rules.
        quantizable: layers that are known to have INT8 kernels: no rule about kernels is asked about them.

    Raises:
        UserError: a pattern matches nothing.
    """
    patterns = tuple(keep_float)
    kept, without_range = KeepFloat.from_patterns(network, patterns), frozenset(unknown)
    measured = KernelProfile.shipped() if profile is None else profile
    slow: dict[str, str] = {}
    while True:  # a layer that returns to float may make another one lose too
        state = PlacementState(network, kept, without_range, slow, measured, frozenset(quantizable))
        for one in PASSES:
            one.run(state)
        more = {op.name: rule.name for rule in _NEIGHBOUR_RULES for op in network if rule.loses(op, state)}
        if not more:
            break
        slow |= more
    in_order = tuple(state.decisions[op.name] for op in network if op.name in state.decisions)
    return Placement(share_scales(network, state.reads), in_order, patterns)


def _unless_stopped(verdict: Verdict, op: Op, state: PlacementState) -> Verdict:
    """``verdict``, or the verdict of an obstacle to one of its reads."""
    for obstacle in OBSTACLES if verdict.quantized else ():
        if reason := obstacle.reason(op, verdict.reads, state):
            return obstacle.keep_float(reason)
    return verdict
