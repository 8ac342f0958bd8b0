"""What stops an operation from reading a tensor quantized, whatever another rule wants."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from qat.graph.network import Op
from qat.rules.rule import PlacementState, Rule, Verdict


class Obstacle(Rule):
    """Asked about every read that another rule wants; of convolutions and linear layers, before any other rule."""

    @abstractmethod
    def reason(self, op: Op, tensors: Iterable[str], state: PlacementState) -> str:
        """Why ``op`` cannot read ``tensors`` quantized; '' when it can."""

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Of a convolution or linear layer, which reads its first input."""
        reason = self.reason(op, op.inputs[:1], state)
        return self.keep_float(reason) if reason else None


class KeptFloat(Obstacle):
    """The operation, or a tensor that it reads, is among what the user keeps in float."""

    name = "kept_float"
    sentence = "kept in float on request"
    source = "the user"

    def reason(self, op: Op, tensors: Iterable[str], state: PlacementState) -> str:
        """The operation itself, or the tensor."""
        if op.name in state.kept.ops:
            return "kept in float"
        return next((f"its input {tensor} is kept in float" for tensor in tensors if tensor in state.kept.tensors), "")


class Integers(Obstacle):
    """A tensor holds no floating-point numbers."""

    name = "integers"
    sentence = "integers are not quantized"
    source = "they have no scale"

    def reason(self, op: Op, tensors: Iterable[str], state: PlacementState) -> str:
        """The tensor."""
        return next(
            (f"its input {tensor} holds integers" for tensor in tensors if not state.network[tensor].floating), ""
        )


class NoRange(Obstacle):
    """No calibration has seen a tensor."""

    name = "no_range"
    sentence = "no calibration gave a range of the tensor that it reads"
    source = "without a range there is no scale"

    def reason(self, op: Op, tensors: Iterable[str], state: PlacementState) -> str:
        """The tensor."""
        unknown = state.without_range
        return next((f"no range is known of its input {tensor}" for tensor in tensors if tensor in unknown), "")


OBSTACLES: tuple[Obstacle, ...] = (KeptFloat(), Integers(), NoRange())
