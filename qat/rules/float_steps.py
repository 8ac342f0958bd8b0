"""The order in which qat.sensitivity leaves operations in float, and the accuracy after each: for deploy.tune."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qat.base import own_json
from qat.base.schema.results import FloatSteps


@dataclass(frozen=True)
class FloatStep:
    """Labels of all operations that are in float by then, and the points of accuracy below the float network."""

    kept: frozenset[str]
    drop: float


def read_float_steps(path: Path) -> tuple[FloatStep, ...]:
    """The steps in a file that qat.sensitivity --json wrote. The first leaves nothing in float.

    Raises UserError when the file cannot be read, or is another one.
    """
    found = own_json.read(path, FloatSteps, "file of costs", "python -m qat.sensitivity --json writes one")
    labels = ["", *(step.label for step in found.keep_float)]
    accuracies = [found.quantized.top1, *(step.top1 for step in found.keep_float)]
    return tuple(
        FloatStep(frozenset(labels[1 : count + 1]), found.float.top1 - top1) for count, top1 in enumerate(accuracies)
    )
