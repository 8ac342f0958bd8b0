"""Where an engine differs from ONNX Runtime: every tensor inside, or the first one, as deploy.evaluate prints it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True, kw_only=True)
class Judgement(ABC):
    """Whether the judged one agrees with the others, and where an engine differs from ONNX Runtime inside.

    Attributes:
        searched: whether the first difference from ONNX Runtime was searched.
        first_difference: the first tensor that differs, if it was searched and found.
        layers: every compared tensor against ONNX Runtime, if that was asked for.
    """

    searched: bool = False
    first_difference: Difference | None = None
    layers: tuple[Difference, ...] = ()

    @property
    @abstractmethod
    def disagreements(self) -> dict[str, str]:
        """The pairs that agree too little, each with what was measured and what is demanded."""

    @property
    def agrees(self) -> bool:
        """Whether it agrees with all others well enough."""
        return not self.disagreements

    def inside(self) -> dict[str, Any]:
        """For the file of results: what was found inside, as far as it was looked for."""
        found: dict[str, Any] = {}
        if self.searched:
            found["first_difference"] = self.first_difference and dataclasses.asdict(self.first_difference)
        if self.layers:
            found["layers"] = [dataclasses.asdict(layer) for layer in self.layers]
        return found


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
