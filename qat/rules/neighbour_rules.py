"""Layers that lose by INT8 because of what their neighbours do.

That is known only when everything else is decided. So qat/rules/place.py calls ``loses`` on a complete placement, and
if there are such layers, repeats the placement with them in float.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from qat.graph.network import Op
from qat.graph.operations import POINTWISE, WEIGHTED
from qat.rules.rule import MEASURED, PlacementState, Rule, Verdict
from qat.rules.weight_rules import GroupedChannels


class NeighbourRule(Rule):
    """Float for the layers that an earlier attempt found to lose."""

    reason: str
    """Why such a layer loses."""

    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """Float, if an earlier attempt found that it loses."""
        return self.keep_float(self.reason) if state.slow_in_int8.get(op.name) == self.name else None

    @abstractmethod
    def loses(self, op: Op, state: PlacementState) -> bool:
        """Whether ``op`` is in INT8 in a complete placement, and loses there."""


class GroupedFloatOutput(NeighbourRule):
    """A grouped convolution whose output is read in float."""

    name = "grouped_float_output"
    sentence = "a grouped convolution has INT8 kernels only if its output is quantized too"
    source = MEASURED
    reason = "its output is read in float"

    def loses(self, op: Op, state: PlacementState) -> bool:
        """Whether ``op`` is a quantized grouped convolution whose output an operation reads in float."""
        if op.weight is None or op.weight.groups == 1 or not state.is_quantized(op):
            return False
        return not state.is_only_read_quantized(state.written_by(op))


class BesideFloatGroups(NeighbourRule):
    """A convolution next to a grouped one that has no INT8 kernel: the conversion between them costs what it gains."""

    name = "beside_float_groups"
    sentence = "convolutions before and behind a grouped one without an INT8 kernel stay in float, as it does"
    source = "benchmarks/gpu_other_networks.txt"
    reason = "it is next to a grouped convolution without an INT8 kernel"

    def loses(self, op: Op, state: PlacementState) -> bool:
        """Whether ``op`` is a quantized convolution that reads from such a one, or that only such ones read."""
        if op.kind != "convolution" or not state.is_quantized(op):
            return False
        before, behind = list(_before(op, state)), list(_behind(op, state))
        return any(_has_no_kernel(one, state) for one in before) or (
            bool(behind) and all(_has_no_kernel(one, state) for one in behind)
        )


def _has_no_kernel(op: Op, state: PlacementState) -> bool:
    found = state.decisions.get(op.name)
    return found is not None and not found.quantized and found.rule == GroupedChannels.name


def _before(op: Op, state: PlacementState) -> Iterator[Op]:
    """The layer that ``op`` reads, with what fuses into it between."""
    source = state.network[op.inputs[0]]
    while source.kind in POINTWISE:
        source = state.network[source.inputs[0]]
    if source.kind in WEIGHTED:
        yield source


def _behind(op: Op, state: PlacementState) -> Iterator[Op]:
    """The operations that read ``op``, behind what fuses into it."""
    waiting = [op]
    while waiting:
        for reader in state.network.readers(waiting.pop().name):
            if reader.kind in POINTWISE:
                waiting.append(reader)
            else:
                yield reader
