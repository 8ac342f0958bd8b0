"""What the lint finds: a node, the rule that it breaks, and what follows, in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class LintFinding:
    """A broken rule.

    Attributes:
        node: name of the node that breaks it.
        rule: name of the rule, such as ``positive_scale``.
        message: what is wrong, and what follows or what to do.
        severity: ``error`` if TensorRT refuses the model or computes something else, ``warning`` if it is slower.
        bytes_per_image: extra memory traffic for each image, in bytes; 0 if there is none, or shapes are not known.
    """

    node: str
    rule: str
    message: str
    severity: Severity = "error"
    bytes_per_image: int = 0

    def __str__(self) -> str:
        return f"{self.node}: {self.message} [{self.rule}]"
