"""Rules that stop an operation from reading a tensor quantized, whatever other rules ask for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from qat.graph.network import Op
from qat.rules.rule import PlacementState, Rule, Verdict


class Obstacle(Rule):
    """A rule that is asked about every read that another rule wants to quantize.

    For convolutions and linear layers it is asked before any other rule.
    """

    @abstractmethod
    def reason(self, op: Op, tensors: Iterable[str], state: PlacementState) -> str:
        """Why ``op`` cannot read ``tensors`` quantized; '' if it can."""

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Float for a convolution or linear layer whose first input cannot be read quantized."""
        reason = self.reason(op, op.inputs[:1], state)
        return self.keep_float(reason) if reason else None


class KeptFloat(Obstacle):
    """The user keeps the operation, or a tensor that it reads, in float."""

    name = "kept_float"
    sentence = "kept in float on request"
    source = "the user"

    def reason(self, op: Op, tensors: Iterable[str], state: PlacementState) -> str:
        """Names the operation itself, or the tensor."""
        if op.name in state.kept.ops:
            return "kept in float"
        return next((f"its input {tensor} is kept in float" for tensor in tensors if tensor in state.kept.tensors), "")


class Integers(Obstacle):
    """A tensor does not hold float32 numbers."""

    name = "integers"
    sentence = "integers, and numbers in half precision, are not quantized"
    source = "they have no scale, or one of another type"

    def reason(self, op: Op, tensors: Iterable[str], state: PlacementState) -> str:
        """Names the tensor."""
        others = [tensor for tensor in tensors if not state.network[tensor].floating]
        return f"its input {others[0]} holds no float32 numbers" if others else ""


class NoRange(Obstacle):
    """Calibration found no range for a tensor."""

    name = "no_range"
    sentence = "calibration gave no range for the tensor that the operation reads"
    source = "without a range there is no scale"

    def reason(self, op: Op, tensors: Iterable[str], state: PlacementState) -> str:
        """Names the tensor."""
        unknown = state.without_range
        return next((f"the range of its input {tensor} is not known" for tensor in tensors if tensor in unknown), "")


OBSTACLES: tuple[Obstacle, ...] = (KeptFloat(), Integers(), NoRange())
