"""What stays in float whatever the network is: by the user's wish, without a known range, and integers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qat.base.errors import UserError
from qat.graph.network import Network, Op
from qat.graph.operations import POOLS, WEIGHTED
from qat.rules.fusion import stands_alone

KEPT_FLOAT, NO_RANGE, INTEGERS = "kept_float", "no_range", "integers"
"""The rules that ``KeepFloat.why`` names."""
_CHOOSABLE = (*WEIGHTED, *POOLS, "add", "concat", "multiply")  # what could be INT8 itself, as some norms could


@dataclass(frozen=True)
class KeepFloat:
    """Operations that stay in float, and tensors that are not quantized: by request, for want of a range, integers."""

    ops: frozenset[str]
    tensors: frozenset[str]
    unknown: frozenset[str]
    integers: frozenset[str]

    @classmethod
    def from_patterns(cls, network: Network, patterns: Iterable[str], unknown: Iterable[str]) -> KeepFloat:
        """What ``patterns`` name (see qat.rules.place.place). Raises UserError when one of them names nothing."""
        named = {name for pattern in patterns for name in _matched(network, pattern)}
        ops = frozenset(name for name in named if _choosable(network, network[name]))
        integers = frozenset(op.name for op in network if not op.floating)
        return cls(ops, frozenset(named - ops), frozenset(unknown), integers)

    def why(self, op: str, tensors: Iterable[str]) -> tuple[str, str]:
        """The rule by which ``op`` cannot read ``tensors`` quantized, and the reason; ('', '') when it can."""
        if op in self.ops:
            return KEPT_FLOAT, "kept in float"
        for tensor in tensors:
            if tensor in self.tensors:
                return KEPT_FLOAT, f"its input {tensor} is kept in float"
            if tensor in self.integers:
                return INTEGERS, f"its input {tensor} holds integers"
            if tensor in self.unknown:
                return NO_RANGE, f"no range is known of its input {tensor}"
        return "", ""


def _matched(network: Network, pattern: str) -> set[str]:
    """The operations that ``pattern`` names."""
    matched = {op.name for op in network if _is_meant(network, op, pattern)}
    if not matched:
        labels = sorted({op.label for op in network})
        close = difflib.get_close_matches(pattern, labels, n=3) or labels[:3]
        raise UserError(
            f"--keep-float {pattern} matches none of the {len(network.ops)} operations; there are, for example, "
            f"{', '.join(close)}"
        )
    return matched


def _choosable(network: Network, op: Op) -> bool:
    return op.kind in _CHOOSABLE or stands_alone(network, op)


def _is_meant(network: Network, op: Op, pattern: str) -> bool:
    """Whether ``pattern`` names ``op``. What could not be INT8 stands for its tensor, and is meant by its very name."""
    if not _choosable(network, op):
        return pattern in (op.name, op.label)
    forms = (pattern, f"{pattern}.*", pattern.removesuffix(".*"))
    return any(fnmatchcase(name, form) for name in (op.name, op.label) for form in forms)
