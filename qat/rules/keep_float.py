"""Finds the operations and tensors that the user's --keep-float patterns name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qat.base.errors import UserError
from qat.graph.network import Network, Op
from qat.graph.operations import POOLS, WEIGHTED
from qat.rules.fusion import stands_alone
from qat.rules.tuned import TunedName

CHOOSABLE = (*WEIGHTED, *POOLS, "add", "concat", "multiply", "matrix_product")
"""Kinds of operations that may be INT8, as some norms may."""


@dataclass(frozen=True)
class KeepFloat:
    """The operations that stay in float and the tensors that are not quantized, on the user's request."""

    ops: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()

    @classmethod
    def from_patterns(cls, network: Network, patterns: Iterable[str]) -> KeepFloat:
        """What ``patterns`` name (see qat.rules.place.place). Raises UserError when a pattern matches nothing."""
        named = {name for pattern in patterns for name in _matches(network, pattern)}
        ops = frozenset(name for name in named if _is_choosable(network, network[name]))
        return cls(ops, frozenset(named - ops))


def _matches(network: Network, pattern: str) -> set[str]:
    """The operations that ``pattern`` names."""
    matched = {op.name for op in network if _is_meant(network, op, pattern)}
    if not matched and isinstance(pattern, TunedName):
        raise UserError(
            f"{pattern.source} was tuned for another network: it leaves {pattern} in float, which this one does not "
            "have; leave it out, or tune this one (python -m deploy.tune)"
        )
    if not matched:
        labels = sorted({op.label for op in network})
        close = difflib.get_close_matches(pattern, labels, n=3) or labels[:3]
        raise UserError(
            f"--keep-float {pattern} matches none of the {len(network.ops)} operations: give the name of one, "
            f"for example {', '.join(close)}"
        )
    return matched


def _is_choosable(network: Network, op: Op) -> bool:
    return op.kind in CHOOSABLE or stands_alone(network, op)


def _is_meant(network: Network, op: Op, pattern: str) -> bool:
    """Whether ``pattern`` names ``op``. An operation that cannot be INT8 stands for its output: give its exact name."""
    if not _is_choosable(network, op):
        return pattern in (op.name, op.label)
    forms = (pattern, f"{pattern}.*", pattern.removesuffix(".*"))
    return any(fnmatchcase(name, form) for name in (op.name, op.label) for form in forms)
