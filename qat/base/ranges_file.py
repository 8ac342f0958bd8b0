"""The file of ranges, ``model.ranges.json`` beside a checkpoint ``model.qat``: what calibration saw of every tensor.

qat/calibration/distributions.py makes its content, deploy.report draws it. It has no sidecar: it names the checkpoint
that it belongs to by its SHA-256. Floats have five significant digits; a null stands for what is not finite.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat.base import own_json
from qat.base.console import warn
from qat.base.errors import UserError, one_line
from qat.base.writing import atomic_write

FORMAT_VERSION, KIND = 1, "ranges"
COUNTS = 128  # bins of a histogram in the file
MOST_CANDIDATES = 64


@dataclass(frozen=True)
class RangeChoice:
    """The range that one method chooses; see qat.calibration.explain.Choice, which has more of it.

    ``amax`` is in the unit of x, ``clipped`` a percentage of the values; ``sqnr_db`` None means no noise.
    """

    method: str
    amax: float
    clipped: float
    sqnr_db: float | None


@dataclass(frozen=True)
class Divergence:
    """The Kullback-Leibler divergence from which entropy chooses, at no more than 64 of its candidates.

    ``amax``: the candidates, in the unit of x, rising; the chosen one is among them. ``cost``: nats; None if infinite.
    """

    amax: tuple[float, ...]
    cost: tuple[float | None, ...]


@dataclass(frozen=True)
class ActivationDistribution:
    """What calibration saw of one quantized tensor, or of several that share a scale.

    Attributes:
        quantizer: its name.
        tensors: the tensors that it quantizes.
        counts: 128 numbers: counts[j] values have |x| in [j, j + 1) * limit / 128.
        limit: upper edge of the last bin, in the unit of x.
        largest: the exact max |x|; None if no image reached the tensor.
        amax: the range in use right after calibration, in the unit of x; None if it has none.
        choices: what each method chooses; the range in use too, as "in use", where that is another.
        kl: None if the tensor is zero or was not reached.
        problem: why there is nothing to choose, as a sentence; '' where there is.
    """

    quantizer: str
    tensors: tuple[str, ...]
    counts: tuple[int, ...]
    limit: float
    largest: float | None
    amax: float | None
    choices: tuple[RangeChoice, ...]
    kl: Divergence | None
    problem: str


@dataclass(frozen=True)
class WeightDistribution:
    """The constant weight of one layer, quantized or not.

    Attributes:
        label: the layer's, as in the placement.
        axis: of the output channels, if each has a scale of its own; None if the weight has one scale.
        largest: max |w| of each output channel, with four significant digits; None where it is not finite.
        dead: the output channels whose weights are all zero, counted from 0.
    """

    label: str
    axis: int | None
    largest: tuple[float | None, ...]
    dead: tuple[int, ...]


@dataclass(frozen=True)
class Distributions:
    """The content of the file.

    Attributes:
        checkpoint: SHA-256 of the checkpoint; '' while the run that will write it goes on.
        calibrator: the method by which ranges were chosen.
        percentile: what the method of that name leaves unclipped, in percent.
        images: how many were calibrated on.
        activations: one for each quantizer, in the order of the network.
        weights: one for each constant weight, in the order of the network.
    """

    checkpoint: str
    calibrator: str
    percentile: float
    images: int
    activations: tuple[ActivationDistribution, ...]
    weights: tuple[WeightDistribution, ...]


def ranges_path(checkpoint: Path) -> Path:
    """``model.qat`` -> ``model.ranges.json``."""
    return checkpoint.with_suffix(".ranges.json")


def write_distributions(path: Path, content: Distributions) -> None:
    """Writes the file; ``path`` appears only once it is complete. Raises UserError when it cannot be written."""
    _write(path, {"format": FORMAT_VERSION, "kind": KIND, **asdict(content)})


def complete_distributions(path: Path, checkpoint_sha256: str) -> None:
    """Enters the checkpoint into the file of a run that has ended; without such a file, nothing is done.

    A file that names a checkpoint already is another run's and stays as it is; so does one that cannot be read, with a
    warning. Raises UserError when it cannot be written.
    """
    if not path.exists():
        return
    try:
        content = _read(path)
    except UserError as error:
        warn(str(error))
        return
    if not content["checkpoint"]:
        _write(path, {**content, "checkpoint": checkpoint_sha256})


def read_distributions(path: Path, checkpoint_sha256: str) -> Distributions:
    """Reads the file that belongs to the checkpoint of this SHA-256.

    Raises UserError when it cannot be read, is not such a file, or belongs to another checkpoint.
    """
    content = _read(path)
    found = content["checkpoint"]
    if not found:
        raise UserError(f"{path} belongs to a run that has not ended: continue that with --resume, or train again")
    if found != checkpoint_sha256:
        raise UserError(
            f"{path} belongs to a checkpoint with SHA-256 {found}, and this one has {checkpoint_sha256}: "
            "train or calibrate again, or copy the file of this checkpoint there"
        )
    return _distributions(content)


def _read(path: Path) -> dict[str, Any]:
    """The content of the file, checked. Raises UserError."""
    again = "train or calibrate again"
    if not path.exists():
        raise UserError(f"no file {path}: {again}; python -m qat.train and qat.calibrate write it")
    try:
        content = own_json.parse(own_json.read_text(path, "file of ranges", again))
    except own_json.JsonError as fault:
        raise UserError(f"{path} cannot be read as a file of ranges ({one_line(fault)}): {again}") from fault
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f"{path} is not a file of ranges: {again}")
    if (version := content.get("format")) != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version!r:.20}, but this program reads {FORMAT_VERSION}: "
            f"{again} with this version"
        )
    try:
        _distributions(content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} lacks or misstates an entry ({one_line(error)}): {again}") from error
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)  # in one line: half as large
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


# --- from JSON; each raises KeyError, TypeError, ValueError or OverflowError on other content


def _distributions(content: Mapping[str, Any]) -> Distributions:
    return Distributions(
        _text(content["checkpoint"]),
        _text(content["calibrator"]),
        _number(content["percentile"]),
        _whole(content["images"]),
        tuple(_activation(entry) for entry in _list(content["activations"])),
        tuple(_weight(entry) for entry in _list(content["weights"])),
    )


def _activation(entry: Mapping[str, Any]) -> ActivationDistribution:
    counts = tuple(_whole(count) for count in _list(entry["counts"]))
    if len(counts) != COUNTS:
        raise ValueError(f"{len(counts)} counts instead of {COUNTS}")
    return ActivationDistribution(
        _text(entry["quantizer"]),
        tuple(_text(tensor) for tensor in _list(entry["tensors"])),
        counts,
        _number(entry["limit"]),
        _number_or_none(entry["largest"]),
        _number_or_none(entry["amax"]),
        tuple(_choice(choice) for choice in _list(entry["choices"])),
        None if entry["kl"] is None else _divergence(entry["kl"]),
        _text(entry["problem"]),
    )


def _choice(entry: Mapping[str, Any]) -> RangeChoice:
    amax, clipped = _number(entry["amax"]), _number(entry["clipped"])
    return RangeChoice(_text(entry["method"]), amax, clipped, _number_or_none(entry["sqnr_db"]))


def _divergence(entry: Mapping[str, Any]) -> Divergence:
    amax = tuple(_number(value) for value in _list(entry["amax"]))
    cost = tuple(_number_or_none(value) for value in _list(entry["cost"]))
    if len(amax) != len(cost):
        raise ValueError(f"{len(amax)} candidates have {len(cost)} costs")
    return Divergence(amax, cost)


def _weight(entry: Mapping[str, Any]) -> WeightDistribution:
    largest = tuple(_number_or_none(value) for value in _list(entry["largest"]))
    dead = tuple(_whole(channel) for channel in _list(entry["dead"]))
    if dead and max(dead) >= len(largest):
        raise ValueError(f"channel {max(dead)} of {len(largest)}")
    axis = None if entry["axis"] is None else _whole(entry["axis"])
    return WeightDistribution(_text(entry["label"]), axis, largest, dead)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _number(value: Any) -> float:
    # json reads NaN and 1e999; neither is written
    if type(value) not in (int, float) or not abs(value) < float("inf"):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _number_or_none(value: Any) -> float | None:
    return None if value is None else _number(value)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value
