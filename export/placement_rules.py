"""Compares the Q/DQ nodes of an ONNX file with where qat/rules wants them; each finding says what a difference costs.

The float network behind the Q/DQ nodes is placed again, and each decision is compared with what the file does. Where a
scale passes through data movement, it does not matter on which side of it the Q stands. A Q behind a concatenation is
as good as one before each of its inputs: TensorRT moves it there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from export.findings import LintFinding
from export.onnx_network import OnnxNetwork
from qat.base.text import megabytes
from qat.graph.data_movement import copies_of, final_reads, first_reads
from qat.graph.network import Op
from qat.graph.operations import COMMUTING, FUSED_ACTIVATIONS, WEIGHTED
from qat.rules.attention_rules import ATTENTION_PRODUCT
from qat.rules.kernel_profile import KernelProfile
from qat.rules.place import RULES, place
from qat.rules.placement import Decision, Placement
from qat.rules.rule import Reads

_FP16_BYTES = 2
_COPYING = (*COMMUTING, "concat")


def placement_findings(view: OnnxNetwork, profile: KernelProfile | None = None) -> list[LintFinding]:
    """What makes the engine slower than it could be, in the order of the network; [] when the placement is right.

    ``profile``: what deploy.kernels measured on a GPU; None for what was measured on an H200.
    """
    wanted = place(view.network, profile=profile)
    compared = _Comparison(view, wanted)
    return [finding for decision in wanted.decisions for finding in compared.decision(decision)] + [
        finding for op in view.network for finding in compared.tensor(op)
    ]


def sentence(rule: str) -> str:
    """What a placement rule says, for people; '' for any other rule, whose findings say everything."""
    return RULES[rule].sentence if rule in RULES else ""


class _Comparison:
    """Compares one file with one placement."""

    def __init__(self, view: OnnxNetwork, wanted: Placement) -> None:
        self.view, self.network = view, view.network
        self.found: Reads = dict.fromkeys(view.reads, "")
        self.wanted: Reads = {(reader, tensor): rule for reader, tensor, rule in wanted.reads()}

    def decision(self, decision: Decision) -> Iterator[LintFinding]:
        """What differs from one decision."""
        op = self.network[decision.op]
        if decision.kind in WEIGHTED:
            yield from self._weighted(op, decision)
        elif not decision.quantized:
            return
        elif decision.kind == "add" and not RULES[decision.rule].cost:
            yield from self._add(op, decision)
        elif decision.kind == "concat":
            yield from self._concat(op, decision)
        elif (cost := RULES[decision.rule].cost) and (missing := self._read_in_float(op)):
            message = f"{self._named(missing)} read in float: {cost}"
            yield self._finding(op, decision.rule, message, sum(self.network[tensor].elements for tensor in missing))

    def tensor(self, op: Op) -> Iterator[LintFinding]:
        """What is wrong with how the tensor of ``op`` is quantized, for all its readers."""
        fusing = [
            reader for reader in self.network.readers(op.name) if reader.kind in ("batch_norm", *FUSED_ACTIVATIONS)
        ]
        for reader in fusing if op.kind in (*WEIGHTED, "batch_norm") else ():
            if (reader.name, op.name) in self.found.keys() - self.wanted.keys():
                message = f"its output is quantized before {reader.label}, which then cannot fuse into it"
                yield self._finding(op, "weighted_output", message, op.elements)
        if op.kind not in COMMUTING and len(scales := self._scales_behind(op.name)) > 1:
            count = len(scales)
            message = f"its output is quantized by {count} different scales, so its codes are computed {count} times"
            yield self._finding(op, "several_scales", message, op.elements * (count - 1))

    def _weighted(self, op: Op, decision: Decision) -> Iterator[LintFinding]:
        given = self._in_int8(op.name, op.inputs[0], self.found)
        weight = op.name in self.view.weights
        if not decision.quantized:
            if given and weight and decision.rule != "shared_weight":
                message = f"it is quantized, but has no INT8 kernel, or a slow one: {decision.reason}"
                yield self._finding(op, decision.rule, message, 0)
            return
        missing = [what for what, there in (("input", given), ("weight", weight)) if not there]
        if decision.group_widths and not missing:
            yield self._finding(op, decision.rule, f"its groups are not padded: {decision.reason}", 0)
        elif missing:
            half = "" if len(missing) == 2 else ", and the Q/DQ on the other only adds work"
            message = f"no Q/DQ on its {' and '.join(missing)}, so it runs in float{half}"
            yield self._finding(op, decision.rule, message, self.network[op.inputs[0]].elements)

    def _add(self, op: Op, decision: Decision) -> Iterator[LintFinding]:
        tensors = list(dict.fromkeys(op.inputs))
        wanted = [tensor for tensor in tensors if self._in_int8(op.name, tensor, self.wanted)]
        found = [tensor for tensor in tensors if self._in_int8(op.name, tensor, self.found)]
        if found == wanted:
            return
        (inside,) = (self._convolution(tensor) for tensor in tensors if tensor not in wanted)
        lost = op.elements * _FP16_BYTES
        cost = f"1 extra reformat{f' of {megabytes(lost, 1)} per image' if lost else ''}"
        if not found or len(found) == len(tensors):
            which = "every input is" if found else "no input is"
            message = f"{which} quantized, so the sum does not fuse into {inside}: {cost}"
        elif decision.rule == "residual_add_of_convolutions":
            message = f"the longer branch is quantized: {inside}, at its end, comes last and should take the sum in"
            lost = 0
        else:
            other = self._named([tensor for tensor in wanted if tensor not in found])
            message = f"{other} read in float, so the sum does not fuse into {inside}: {cost}"
        yield self._finding(op, decision.rule, message, lost)

    def _concat(self, op: Op, decision: Decision) -> Iterator[LintFinding]:
        missing = self._read_in_float(op)
        scales = {self._scale(op.name, tensor) for tensor in op.inputs} | self._scales_behind(op.name)
        scales.discard(None)
        if missing and not self._only_read_as_codes(op.name):
            message = f"{self._named(missing)} read in float, so it copies FP16, and its result is quantized once more"
            elements = sum(self.network[tensor].elements for tensor in missing)
            yield self._finding(op, decision.rule, message, elements)
        elif len(scales) > 1:
            message = (
                f"its inputs and output have {len(scales)} different scales, so codes are computed anew, not copied"
            )
            yield self._finding(op, decision.rule, message, op.elements)

    def _only_read_as_codes(self, tensor: str) -> bool:
        return all(read in self.found for read in final_reads(self.network, tensor, self.found))

    def _read_in_float(self, op: Op) -> list[str]:
        return [tensor for tensor in dict.fromkeys(op.inputs) if not self._in_int8(op.name, tensor, self.found)]

    def _in_int8(self, reader: str, tensor: str, reads: Reads) -> bool:
        """Whether ``reader`` gets codes of ``tensor``, by itself or out of what moves data."""
        ways = first_reads(self.network, (reader, tensor), reads, _COPYING)
        return all(read in reads for read in ways)

    def _scale(self, reader: str, tensor: str) -> float | None:
        """The scale of the codes that ``reader`` gets of ``tensor``, looked for behind data movement."""
        return self.view.scale(*next(first_reads(self.network, (reader, tensor), self.found, _COPYING)))

    def _scales_behind(self, tensor: str) -> set[float | None]:
        """All scales by which a tensor, and what data movement makes of it, is read; but not by an attention.

        Its factors may be parts of one tensor, and have scales of their own.
        """
        reads = {
            (reader.name, copy) for copy in copies_of(self.network, tensor) for reader in self.network.readers(copy)
        }
        scales = {self.view.scale(*read) for read in reads if self.wanted.get(read) != ATTENTION_PRODUCT}
        return scales - {None}

    def _convolution(self, tensor: str) -> str:
        """The convolution whose result a tensor is, perhaps through batch normalization and the like."""
        op = self.network[tensor]
        while op.kind not in WEIGHTED:
            op = self.network[op.inputs[0]]
        return op.label

    def _named(self, tensors: Collection[str]) -> str:
        """``a is``, ``a and b are``, ``a, b, c and 4 more are``."""
        labels = [self.network[tensor].label for tensor in tensors]
        shown = labels if len(labels) <= 4 else [*labels[:3], f"{len(labels) - 3} more"]
        return f"{', '.join(shown[:-1])} and {shown[-1]} are" if len(shown) > 1 else f"{shown[0]} is"

    def _finding(self, op: Op, rule: str, message: str, extra_bytes: int) -> LintFinding:
        return LintFinding(op.label, rule, message, "warning", extra_bytes)
