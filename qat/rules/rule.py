"""The interface of a placement rule: a name, a sentence, a source, and a decision about one operation.

A rule sees operations, channel counts, shapes and the graph, never the names of models or classes. It answers with a
``Verdict``, or with None if it does not apply; qat/rules/place.py asks the rules in order and applies the verdicts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from qat.graph.data_movement import Read, final_reads
from qat.graph.network import Network, Op
from qat.graph.operations import FUSED_ACTIVATIONS, WEIGHTED
from qat.rules.fusion import fusing_convolution, gate_products, written_by
from qat.rules.keep_float import KeepFloat
from qat.rules.kernel_profile import KernelProfile
from qat.rules.placement import Decision

GUIDE = "TensorRT Developer Guide, Working with Quantized Types, Q/DQ Placement Recommendations"
HEURISTICS = "heuristics of NVIDIA's ONNX quantizer"
MEASURED = "benchmarks/gpu_placement.txt"
PROFILE = "layers measured by deploy.kernels: qat/rules/profiles"
LAYERS = "times of layers: benchmarks/gpu_other_networks.txt"
BYTES = "bytes that TensorRT-RTX's layers write: benchmarks/placement_table.txt"

Reads = Mapping[Read, str]
"""(reader, tensor) -> name of the rule because of which the reader reads the tensor quantized."""


@dataclass(frozen=True)
class RuleText:
    """A rule's sentence, which is shown beside its decisions, and the source of its claim."""

    sentence: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """A rule's answer about an operation: it computes in INT8 and reads ``reads`` quantized, or in float for a reason.

    ``rule`` is the name under which the decision and the reads are recorded; ``group_widths`` are those of a grouped
    convolution that is to be padded with zero channels.
    """

    rule: str
    quantized: bool
    reads: tuple[str, ...] = ()
    reason: str = ""
    group_widths: tuple[int, int] | None = None


class Rule(ABC):
    """One placement rule; each is one object (qat/rules/place.py lists them)."""

    name: ClassVar[str]
    """The rule's name in decisions, checkpoints and findings."""
    sentence: ClassVar[str]
    """What the rule says, for people."""
    source: ClassVar[str]
    """Where the claim comes from."""
    cost: ClassVar[str] = ""
    """The consequence if the rule wants all inputs of an operation quantized and some are not."""

    about_kernels: ClassVar[bool] = False
    """Whether it says which layers have INT8 kernels."""

    @abstractmethod
    def decide(self, op: Op, state: PlacementState) -> Verdict | None:
        """The rule's verdict on ``op``, given everything decided so far in ``state``; None if it does not apply."""

    @property
    def text(self) -> RuleText:
        """The sentence and its source."""
        return RuleText(self.sentence, self.source)

    def quantize(self, *tensors: str) -> Verdict:
        """The verdict that the operation computes in INT8 and reads ``tensors`` quantized."""
        return Verdict(self.name, True, tensors)

    def keep_float(self, reason: str) -> Verdict:
        """The verdict that the operation computes in float."""
        return Verdict(self.name, False, (), reason)


@dataclass
class PlacementState:
    """A placement while it is being made.

    ``kept``: what the user keeps in float; ``without_range``: tensors for which calibration found no range;
    ``slow_in_int8``: layers that an earlier attempt found to be slower in INT8, given what their neighbours do, and the
    name of the rule that found it;
    ``profile``: what was measured on a GPU; ``quantizable``: layers that are known to have INT8 kernels.
    """

    network: Network
    kept: KeepFloat = field(default_factory=KeepFloat)
    without_range: frozenset[str] = frozenset()
    slow_in_int8: Mapping[str, str] = field(default_factory=dict)
    profile: KernelProfile = field(default_factory=KernelProfile.shipped)
    quantizable: frozenset[str] = frozenset()
    decisions: dict[str, Decision] = field(default_factory=dict)
    reads: dict[Read, str] = field(default_factory=dict)

    def record(self, op: Op, verdict: Verdict) -> None:
        """Applies a verdict; it replaces an earlier one about ``op``."""
        self.decisions[op.name] = Decision(
            op.name, op.label, op.kind, verdict.quantized, verdict.rule, verdict.reason, verdict.group_widths
        )
        for read in [read for read in self.reads if read[0] == op.name]:
            del self.reads[read]
        self.reads |= {(op.name, tensor): verdict.rule for tensor in verdict.reads}

    def is_quantized(self, op: Op) -> bool:
        """Whether it was decided that ``op`` computes in INT8."""
        return op.name in self.decisions and self.decisions[op.name].quantized

    @cached_property
    def int8_layers(self) -> set[str]:
        """The convolutions and linear layers in INT8. Use it only when all of them are decided."""
        return {op.name for op in self.network if op.kind in WEIGHTED and self.is_quantized(op)}

    @cached_property
    def gates(self) -> set[str]:
        """The products that are gates."""
        return gate_products(self.network)

    def fusing_convolution(self, tensor: str) -> str | None:
        """The INT8 convolution that makes ``tensor``, with at most normalization between; a sum can fuse into it."""
        return fusing_convolution(self.network, tensor, self.int8_layers)

    def takes_sum(self, tensor: str) -> bool:
        """Whether an addition can fuse into the INT8 convolution that makes ``tensor``: not into a depthwise one.

        TensorRT 8.6.0 has no INT8 kernel for a depthwise convolution with a sum (seen at 8 channels). Nor into a linear
        layer: transformers are faster where their sums, and so what their normalizations read, stay in float.
        """
        found = self.fusing_convolution(tensor)
        layer = None if found is None else self.network[found]
        return layer is not None and layer.kind == "convolution" and not (layer.weight and layer.weight.is_depthwise)

    def written_by(self, op: Op) -> str:
        """The tensor that the kernel of ``op`` writes, including everything that fuses into that kernel."""

        def takes_in(following: Op, tensor: str) -> bool:
            takes_sum = following.kind == "add" and self.is_quantized(following)
            fuses = following.kind in ("batch_norm", *FUSED_ACTIVATIONS) or takes_sum
            return fuses and (following.name, tensor) not in self.reads

        return written_by(self.network, op, takes_in)

    def is_read_quantized(self, tensor: str) -> bool:
        """Whether any operation reads ``tensor``, or a moved copy of it, quantized."""
        return any(read in self.reads for read in final_reads(self.network, tensor, self.reads))

    def is_only_read_quantized(self, tensor: str) -> bool:
        """Whether no operation reads ``tensor``, or a moved copy of it, in float."""
        return all(read in self.reads for read in final_reads(self.network, tensor, self.reads))
