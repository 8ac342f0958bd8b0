"""What a lint finds: a node, the rule that it breaks, and what follows from it in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class LintFinding:
    """A broken rule. error: TensorRT refuses the model, or does not compute what it says; warning: it is slower for it.

    ``bytes_per_image`` is the extra memory traffic that follows, where shapes tell.
    """

    node: str
    rule: str
    message: str
    severity: Severity = "error"
    bytes_per_image: int = 0

    def __str__(self) -> str:
        return f"{self.node}: {self.message} [{self.rule}]"
