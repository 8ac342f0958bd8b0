"""The order in which qat.sensitivity leaves operations in float, and the accuracy after each: for deploy.tune."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qat.base.errors import UserError, one_line
from qat.base.regular_file import read_json


@dataclass(frozen=True)
class FloatStep:
    """Labels of all operations that are in float by then, and the points of accuracy below the float network."""

    kept: frozenset[str]
    drop: float


def read_float_steps(path: Path) -> tuple[FloatStep, ...]:
    """The steps in a file that qat.sensitivity --json wrote. The first leaves nothing in float.

    Raises UserError when the file cannot be read, or is another one.
    """
    try:
        content = read_json(path)
        reference = float(content["float"]["top1"])
        measured = [("", float(content["quantized"]["top1"]))]
        measured += [(str(step["label"]), float(step["top1"])) for step in content["keep_float"]]
        if not all(math.isfinite(top1) for top1 in (reference, *(top1 for _, top1 in measured))):
            raise ValueError("an accuracy is not finite")
    except OSError as error:
        raise UserError(f"cannot read the costs {path} ({error}): check the path") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not what python -m qat.sensitivity --json writes ({one_line(error)}): make it"
        ) from error
    labels = [label for label, _ in measured]
    return tuple(
        FloatStep(frozenset(labels[1 : count + 1]), reference - top1) for count, (_, top1) in enumerate(measured)
    )
