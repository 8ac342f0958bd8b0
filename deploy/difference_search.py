"""Where an engine differs from ONNX Runtime: every tensor inside, or the first one, as deploy.evaluate prints it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploy.bisect import Difference, bisect, every_difference
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from qat.base.artifact import Sidecar
from qat.base.console import say, table
from qat.base.sqnr import worst_first
from qat.base.text import decibels

if TYPE_CHECKING:
    from deploy.trt import Toolkit

SHOWN = 10


def _built_with(sidecar: Sidecar) -> tuple[Toolkit, BuildSettings]:
    """The builder of an engine, and its settings."""
    return find_toolkit(sidecar.details["builder"]["name"]), BuildSettings.from_json(sidecar.details["settings"])


def compare_layers(sidecar: Sidecar, model: Path, reference_model: Path, inputs: np.ndarray) -> tuple[Difference, ...]:
    """Builds the engine once more, with the tensors inside as outputs, and prints those that differ most."""
    say("comparing the tensors inside with ONNX Runtime's")
    toolkit, settings = _built_with(sidecar)
    found = every_difference(toolkit, model, reference_model, inputs, settings)
    worst = sorted(found, key=lambda one: worst_first(one.sqnr_db))[:SHOWN]
    title = f"{len(found)} tensors inside, the {len(worst)} that differ most"
    table(title, ("tensor", "SQNR"), [(one.tensor, decibels(one.sqnr_db)) for one in worst])
    return found


def find_difference(
    sidecar: Sidecar, model: Path, reference_model: Path, inputs: np.ndarray, least_sqnr: float
) -> Difference | None:
    """Builds engines with tensors inside as outputs until the first one that differs is found, and prints it."""
    say("searching the first layer that differs from ONNX Runtime")

    def report(name: str, sqnr_db: float | None) -> None:
        say(f"  {name}: {decibels(sqnr_db)}")

    toolkit, settings = _built_with(sidecar)
    found = bisect(toolkit, model, reference_model, inputs, settings, least_sqnr, report)
    if found is None:
        say(f"every tensor agrees to {least_sqnr:g} dB or better; raise --least-sqnr to find smaller differences")
    else:
        say(f"the first layer that differs is {found.node}: its output {found.tensor} has {found.sqnr_db:.1f} dB")
    return found
