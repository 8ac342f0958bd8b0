"""An ONNX file's Q/DQ nodes held against where qat/rules.py wants them; each finding says what the difference costs.

The float network behind the Q/DQ nodes is placed anew, and each decision is compared with what the file does. Where a
scale passes through data movement it does not matter on which side of it the Q stands.
"""

from __future__ import annotations

from collections.abc import Iterator

from export.findings import Finding, megabytes
from export.onnx_network import OnnxNetwork
from qat.decisions import Decision, Placement
from qat.network import Op
from qat.operations import COMMUTING, WEIGHTED
from qat.rules import RULES, place

_FP16_BYTES = 2
_THROUGHOUT = {
    "pool_input": "the pool runs in FP16 between INT8 layers",
    "gate_product": "the gate multiplies in FP16, so the convolutions around it write and read FP16",
    "unfused_activation": "the activation's kernel reads FP16",
    "shared_concat_scale": "the concatenation copies FP16 and its result is quantized again",
}


def placement_findings(view: OnnxNetwork) -> list[Finding]:
    """What makes the engine slower than it could be, in the order of the network; [] when the placement is right."""
    wanted = place(view.network)
    compared = _Comparison(view, wanted)
    return [finding for decision in wanted.decisions for finding in compared.decision(decision)] + [
        finding for op in view.network for finding in compared.tensor(op)
    ]


class _Comparison:
    """One file against one placement."""

    def __init__(self, view: OnnxNetwork, wanted: Placement) -> None:
        self.view, self.network = view, view.network
        self.wanted = {(reader, tensor) for reader, tensor, _ in wanted.reads()}

    def decision(self, decision: Decision) -> Iterator[Finding]:
        """What differs from one decision."""
        op = self.network[decision.op]
        if decision.kind in WEIGHTED:
            yield from self._weighted(op, decision)
        elif decision.kind == "add" and decision.quantized:
            yield from self._add(op, decision)
        elif decision.quantized and decision.rule in _THROUGHOUT:
            yield from self._throughout(op, decision)

    def tensor(self, op: Op) -> Iterator[Finding]:
        """What is wrong with how the tensor of ``op`` is quantized, whoever reads it."""
        readers = [reader for reader in self.network.readers(op.name) if (reader.name, op.name) in self.view.reads]
        for reader in readers:
            if op.kind in (*WEIGHTED, "batch_norm") and reader.kind in ("batch_norm", "activation"):
                message = f"its output is quantized before {reader.label}, which then cannot fuse into it"
                yield self._finding(op, "weighted_output", message, op.elements)
        scales = {self.view.scale(reader.name, op.name) for reader in readers}
        if len(scales) > 1:
            message = f"its output is quantized by {len(scales)} different scales, so it is written {len(scales)} times"
            yield self._finding(op, "several_scales", message, op.elements * (len(scales) - 1))

    def _weighted(self, op: Op, decision: Decision) -> Iterator[Finding]:
        given = self._read_in_int8(op.name, op.inputs[0], found=True)
        weight = op.name in self.view.weights
        if not decision.quantized:
            if given and weight:
                yield self._finding(op, decision.rule, f"it is quantized, but {decision.reason}: it runs in float", 0)
            return
        missing = [what for what, there in (("input", given), ("weight", weight)) if not there]
        if missing:
            half = "" if len(missing) == 2 else ", and the Q/DQ on the other only adds work"
            message = f"no Q/DQ on its {' and '.join(missing)}, so it runs in float{half}"
            yield self._finding(op, decision.rule, message, self.network[op.inputs[0]].elements)

    def _add(self, op: Op, decision: Decision) -> Iterator[Finding]:
        tensors = dict.fromkeys(op.inputs)
        wanted = {tensor for tensor in tensors if self._read_in_int8(op.name, tensor, found=False)}
        found = {tensor for tensor in tensors if self._read_in_int8(op.name, tensor, found=True)}
        if found == wanted:
            return
        lost = op.elements * _FP16_BYTES
        cost = f"1 extra reformat{f' of {megabytes(lost)} per image' if lost else ''}"
        (inside,) = set(tensors) - wanted
        if not found:
            message = f"no input is quantized, so this add cannot fuse into the convolution before it: {cost}"
        elif found == set(tensors):
            message = f"every input is quantized, so the sum does not fuse into the convolution of {self.network[inside].label}: {cost}"
        elif inside in found:
            message = f"{self.network[inside].label} is quantized, the input whose convolution could have taken the sum in: {cost}"
        else:
            message = f"{', '.join(sorted(wanted - found))} is read in float: {cost}"
        yield self._finding(op, decision.rule, message, lost)

    def _throughout(self, op: Op, decision: Decision) -> Iterator[Finding]:
        tensors = list(dict.fromkeys(op.inputs))
        missing = [tensor for tensor in tensors if not self._read_in_int8(op.name, tensor, found=True)]
        if missing:
            elements = sum(self.network[tensor].elements for tensor in missing)
            message = f"{', '.join(missing[:3])} is read in float: {_THROUGHOUT[decision.rule]}"
            yield self._finding(op, decision.rule, message, elements)
        elif op.kind == "concat" and len(scales := {self._scale(op.name, tensor) for tensor in tensors}) > 1:
            message = f"its inputs have {len(scales)} different scales, so they are quantized anew instead of copied"
            yield self._finding(op, decision.rule, message, op.elements)

    def _read_in_int8(self, reader: str, tensor: str, *, found: bool) -> bool:
        """Whether ``reader`` gets codes of ``tensor``, in the file as ``found`` or as it is wanted."""
        edges = self.view.reads if found else self.wanted
        if (reader, tensor) in edges:
            return True
        made = self.network[tensor]
        passes = made.kind in COMMUTING or made.kind == "concat"
        return passes and all(self._read_in_int8(made.name, given, found=found) for given in made.inputs)

    def _scale(self, reader: str, tensor: str) -> float | None:
        """The scale of the codes that ``reader`` gets of ``tensor``, looked for behind data movement."""
        made = self.network[tensor]
        while (reader, tensor) not in self.view.reads and made.inputs:
            reader, tensor = made.name, made.inputs[0]
            made = self.network[tensor]
        return self.view.scale(reader, tensor)

    def _finding(self, op: Op, rule: str, message: str, extra_bytes: int) -> Finding:
        return Finding(op.label, rule, message, "warning", extra_bytes)


def sentence(rule: str) -> str:
    """What a rule says, for people; '' of a hard rule, whose findings say all."""
    return RULES[rule].sentence if rule in RULES else ""
