"""What deploy.tune found for one network on one GPU: which layers to leave in float, as a file."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qat.base.artifact import write_json
from qat.base.console import say, warn
from qat.base.errors import UserError, one_line
from qat.base.regular_file import read_json


@dataclass(frozen=True)
class Trial:
    """A placement that was tried: what it changes, and the engine's median milliseconds, None if it was refused."""

    what: str
    milliseconds: float | None
    kept: bool


@dataclass(frozen=True)
class FrontierPoint:
    """A placement that gives up speed for accuracy.

    Attributes:
        drop: points of accuracy below the float network, measured without what speed leaves in float.
        keep_float: labels of the operations that stay in float.
        milliseconds: the engine's median.
    """

    drop: float
    keep_float: tuple[str, ...]
    milliseconds: float


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
    batch: int
    int8_ms: float
    float_ms: float
    tuned_ms: float
    trials: tuple[Trial, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()

    @classmethod
    def read(cls, path: Path) -> TunedPlacement:
        """Raises UserError when the file cannot be read or is no tuned placement."""
        try:
            content = read_json(path)
            if unknown := content.keys() - {field.name for field in fields(cls)}:
                raise ValueError(f"unknown entry {min(unknown)}")
            trials = tuple(Trial(**trial) for trial in content.pop("trials"))
            frontier = tuple(
                FrontierPoint(**{**point, "keep_float": tuple(point["keep_float"])})
                for point in content.pop("frontier", ())
            )
            keep_float, layers = (tuple(map(str, content.pop(key))) for key in ("keep_float", "layers"))
            return cls(keep_float=keep_float, layers=layers, trials=trials, frontier=frontier, **content)
        except OSError as error:
            raise UserError(f"cannot read the placement {path} ({error}): check the path") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} is no tuned placement ({one_line(error)}): python -m deploy.tune makes one"
            ) from error

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
