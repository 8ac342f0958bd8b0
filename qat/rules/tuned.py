"""What deploy.tune found for one network on one GPU: which layers to leave in float, as a file."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat.base import own_json
from qat.base.artifact import write_json
from qat.base.console import say, warn
from qat.base.schema.leaves import Number, Positive, Size


@dataclass(frozen=True)
class Trial:
    """A placement that was tried: what it changes, and the engine's median milliseconds, None if it was refused."""

    what: str
    milliseconds: Positive | None
    kept: bool


@dataclass(frozen=True)
class FrontierPoint:
    """A placement that gives up speed for accuracy.

    Attributes:
        drop: points of accuracy below the float network, measured without what speed leaves in float.
        keep_float: labels of the operations that stay in float.
        milliseconds: the engine's median.
    """

    drop: Number
    keep_float: tuple[str, ...]
    milliseconds: Positive


@dataclass(frozen=True, kw_only=True)
class TunedPlacement:
    """The result of a search.

    Attributes:
        keep_float: labels of the operations that stay in float.
        layers: labels of all convolutions and linear layers of the network.
        gpu, tensorrt, batch: what it was tuned for.
        int8_ms, float_ms, tuned_ms: median latency of the engine by rules alone, of FP16, and of the tuned one.
        trials: what was tried, in order.
        frontier: accuracy against speed, if accuracy counted.
    """

    keep_float: tuple[str, ...]
    layers: tuple[str, ...]
    gpu: str
    tensorrt: str
    batch: Size
    int8_ms: Positive
    float_ms: Positive
    tuned_ms: Positive
    trials: tuple[Trial, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()

    @classmethod
    def read(cls, path: Path) -> TunedPlacement:
        """Raises UserError when the file cannot be read or is no tuned placement."""
        return own_json.read(path, cls, "tuned placement", "python -m deploy.tune makes one")

    def write(self, path: Path) -> None:
        """Writes it as JSON. Raises UserError when the disk does not take it."""
        write_json(path, asdict(self))


def warn_if_tuned_elsewhere(details: Mapping[str, Any], gpu: str, tensorrt: str) -> None:
    """Warns when a file was tuned for another GPU or version; ``details`` are those of its sidecar."""
    tuned = details.get("tuned")
    if not tuned:
        return
    here, there = (gpu, tensorrt), (tuned.get("gpu"), tuned.get("tensorrt"))
    if here != there:
        warn(
            f"the file was tuned for {there[0]} with TensorRT {there[1]}, and this is {gpu} with {tensorrt}: what it "
            "leaves in float may be slower here; tune it again (python -m deploy.tune)"
        )


class TunedName(str):
    """A pattern that matches one operation, which the tuned placement ``source`` leaves in float."""

    source: Path


def tuned_names(path: Path) -> tuple[TunedName, ...]:
    """What a tuned placement leaves in float, for the argument ``keep_float``. Says what it was tuned for.

    Raises UserError as ``TunedPlacement.read`` does.
    """
    tuned = TunedPlacement.read(path)
    say(
        f"placement {path}: {len(tuned.keep_float)} operations stay in float, tuned on {tuned.gpu} with TensorRT "
        f"{tuned.tensorrt} for batch {tuned.batch}"
    )
    names = tuple(TunedName(glob.escape(label)) for label in tuned.keep_float)
    for name in names:
        name.source = path
    return names
