"""The result of placement: which tensors are quantized, which operations read them so, and the rule of each decision.

qat.rules.place.place makes it, every checkpoint saves it, and qat.fake_quantize.prepare and export.quantize apply it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qat.graph.operations import WEIGHTED, OpKind

_COUNTED: tuple[tuple[str, tuple[OpKind, ...]], ...] = (
    ("convolutions and linear layers", WEIGHTED),
    ("additions", ("add",)),
    ("concatenations", ("concat",)),
    ("average pools", ("average_pool", "global_pool")),
    ("gates", ("multiply",)),
    ("unfused activations", ("unfused_activation", "swish")),
    ("unfused normalizations", ("batch_norm",)),
    ("products of activations", ("matrix_product",)),
)


@dataclass(frozen=True)
class QuantizedRead:
    """The operation ``reader`` reads a tensor through its quantizer, because of ``rule``."""

    reader: str
    rule: str


@dataclass(frozen=True)
class QuantizedTensor:
    """An activation that has a quantizer. ``reads`` use it; other readers take the float tensor.

    Tensors with the same ``quantizer`` share one scale.
    """

    tensor: str
    quantizer: str
    reads: tuple[QuantizedRead, ...]


@dataclass(frozen=True)
class Decision:
    """Whether an operation computes on INT8 codes, the rule that decided it, and the reason where one is known.

    ``group_widths``: input and output channels of a group to which export pads a grouped convolution with zeros.
    """

    op: str
    label: str
    kind: OpKind
    quantized: bool
    rule: str
    reason: str = ""
    group_widths: tuple[int, int] | None = None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Decision:
        """As a sidecar has it. Raises KeyError or TypeError on any other content."""
        widths = content.get("group_widths")
        return cls(**{**content, "group_widths": widths if widths is None else tuple(widths)})


@dataclass(frozen=True)
class Placement:
    """All decisions for one network, in the order of its operations.

    ``keep_float`` are the patterns with which the user kept operations and tensors in float.
    """

    tensors: tuple[QuantizedTensor, ...]
    decisions: tuple[Decision, ...]
    keep_float: tuple[str, ...] = ()

    def decisions_about(self, *kinds: OpKind) -> tuple[Decision, ...]:
        """The decisions about operations of these kinds."""
        return tuple(decision for decision in self.decisions if decision.kind in kinds)

    @property
    def weights(self) -> tuple[Decision, ...]:
        """The decisions about convolutions and linear layers: the weight is quantized if and only if the input is."""
        return self.decisions_about(*WEIGHTED)

    def reads(self) -> Iterator[tuple[str, str, str]]:
        """Every quantized read: (reader, tensor, rule)."""
        for tensor in self.tensors:
            for read in tensor.reads:
                yield read.reader, tensor.tensor, read.rule

    def scale_groups(self) -> dict[str, list[str]]:
        """Quantizers that several tensors share, and those tensors."""
        groups: dict[str, list[str]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.quantizer, []).append(tensor.tensor)
        return {quantizer: tensors for quantizer, tensors in groups.items() if len(tensors) > 1}

    def summary(self) -> list[str]:
        """A line that says how many operations of each kind are INT8, and a line about what the user kept in float."""
        counts = []
        for name, kinds in _COUNTED:
            if decisions := self.decisions_about(*kinds):
                counts.append(f"{sum(decision.quantized for decision in decisions)} of {len(decisions)} {name}")
        tensors, groups = len(self.tensors), len(self.scale_groups())
        sharing = f"{tensors} tensors quantized, {groups} groups that share a scale"
        lines = [f"INT8: {', '.join(counts) or 'nothing'}; {sharing}"]
        if self.keep_float:
            lines.append(f"kept in float on request: --keep-float {shlex.join(self.keep_float)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The placement as plain dictionaries and lists, for a sidecar."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Placement:
        """The inverse of ``to_json``. Raises KeyError or TypeError on any other content."""
        tensors = tuple(
            QuantizedTensor(t["tensor"], t["quantizer"], tuple(QuantizedRead(**read) for read in t["reads"]))
            for t in content["tensors"]
        )
        decisions = tuple(Decision.from_json(decision) for decision in content["decisions"])
        return cls(tensors, decisions, tuple(content["keep_float"]))
