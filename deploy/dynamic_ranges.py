"""The ranges of implicit INT8, which older versions have: each tensor gets one, and the builder chooses precisions.

A range file is

    CSV     tensor,min,max in the first line, then a line for each tensor
    JSON    {"tensor": [min, max], ...}, or [{"tensor": ..., "min": ..., "max": ...}, ...]
    cache   a calibration cache of TensorRT, whose scales are amax / 127
    .onnx   a Q/DQ file, .qat: a checkpoint of qat, whose scales are amax / 127 too

TensorRT has symmetric ranges only, so of min and max the larger magnitude counts.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.parsed_network import kind_of
from qat.base.calibration_cache import CalibrationCache, looks_like_calibration_cache
from qat.base.errors import UserError
from qat.base.number_format import INT8
from qat.base.regular_file import read_text
from qat.base.text import did_you_mean

if TYPE_CHECKING:
    import tensorrt as trt

# Kinds of layers whose output has the range of their input.
_MOVING = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY", "MAX")
_REMEDY = 'give a CSV file with the columns tensor,min,max, or JSON like {"conv1": [-2.5, 2.5]}'


@dataclass(frozen=True)
class RangeTable:
    """The amax of tensors by name, each above 0.

    Attributes:
        source: where it comes from, for messages.
        amax: by tensor.
        lopsided: how many tensors have a min and a max of different magnitudes.
        zero: tensors whose range is 0, which tells nothing.
        other: the amax of every tensor that is not named; None: it has none.
    """

    source: str
    amax: Mapping[str, float]
    lopsided: int = 0
    zero: tuple[str, ...] = ()
    other: float | None = None

    @classmethod
    def read(cls, path: str | Path, *, trust_code: bool = False) -> RangeTable:
        """A range file. Raises UserError when it cannot be read, and for a range that is none, naming its tensor.

        ``trust_code``: run the code that a stranger's checkpoint names (docs/trust.md).
        """
        path = Path(path)
        if path.suffix in (".onnx", ".qat"):
            return cls(str(path), _quantized_ranges(path, trust_code))
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the ranges {path} ({error}): check the path") from error
        if looks_like_calibration_cache(text):
            scales = CalibrationCache.read(path).scales
            ranges = {tensor: (-INT8.high * scale, INT8.high * scale) for tensor, scale in scales.items()}
        else:
            rows = list(_rows_of_json(path, text) if text.lstrip()[:1] in ("{", "[") else _rows_of_csv(path, text))
            ranges = dict(rows)
            if len(ranges) < len(rows):
                tensor, count = Counter(name for name, _ in rows).most_common(1)[0]
                raise UserError(f"{path} has {count} ranges for {tensor}: leave one")
        if not ranges:
            raise UserError(f"{path} holds no range: {_REMEDY}")
        amax = {tensor: _amax(path, tensor, low, high) for tensor, (low, high) in ranges.items()}
        lopsided = sum(abs(low) != abs(high) for low, high in ranges.values())
        zero = tuple(tensor for tensor, largest in amax.items() if not largest)
        if len(zero) == len(amax):
            raise UserError(f"{path}: every range is 0, which tells nothing: measure them again")
        return cls(str(path), {tensor: largest for tensor, largest in amax.items() if largest}, lopsided, zero)

    @classmethod
    def constant(cls, amax: float) -> RangeTable:
        """The same range for every tensor: such an engine shows how fast implicit INT8 is, not how accurate."""
        return cls(f"a constant of {amax:g}", {}, other=amax)

    def over(self, other: RangeTable) -> RangeTable:
        """These ranges, and those of ``other`` for the tensors that have none here."""
        source = f"{self.source}, then {other.source}"
        amax = {**other.amax, **self.amax}
        zero = tuple(name for name in dict.fromkeys((*self.zero, *other.zero)) if name not in amax)
        return RangeTable(source, amax, self.lopsided + other.lopsided, zero, other.other)

    def unknown(self, tensors: Collection[str]) -> list[str]:
        """The tensors of this table that a network with ``tensors`` does not have."""
        return [name for name in (*self.amax, *self.zero) if name not in tensors]

    def apply(self, network: trt.INetworkDefinition, module: Any) -> list[str]:
        """Gives the floating-point tensors of a network, inputs included, their ranges; returns those without one.

        Tensors that are not in the table take the range of what they only pass on (``_passed_on``). ``module`` is
        TensorRT's Python module.

        Raises UserError when no tensor of the network is in the table.
        """
        tensors = dict(_floating_tensors(network))
        if self.other is None and not self.amax.keys() & tensors.keys():
            unknown = next(iter(self.amax))
            raise UserError(
                f"{self.source} is for another network: it has none of its {len(tensors)} tensors, but "
                f"{unknown!r}{did_you_mean(unknown, list(tensors))}"
            )
        missing = []
        known = _passed_on(network, {name: self.amax[name] for name in self.amax.keys() & tensors.keys()}, module)
        for name, tensor in tensors.items():
            amax = known.get(name, self.other)
            if amax is None:
                missing.append(name)
            else:
                tensor.set_dynamic_range(-amax, amax)
        return missing


def is_calibration_cache(path: Path) -> bool:
    """Whether a file that has been read as ranges is a calibration cache."""
    with open(path, "rb") as file:
        return path.suffix not in (".onnx", ".qat") and looks_like_calibration_cache(
            file.read(100).decode(errors="replace")
        )


def _floating_tensors(network: trt.INetworkDefinition) -> Iterator[tuple[str, Any]]:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        tensors += [layer.get_output(output) for output in range(layer.num_outputs)]
    return ((tensor.name, tensor) for tensor in tensors if tensor.dtype.name in ("FLOAT", "HALF"))


def _passed_on(network: trt.INetworkDefinition, known: Mapping[str, float], module: Any) -> dict[str, float]:
    """``known``, and the ranges that follow from it without a measurement.

    A layer that only moves values has one range on both sides. What a ReLU alone reads is clipped at the ReLU's range
    anyway, because it is computed together with what makes it. Who takes an output of the network reads it, too.
    """
    found = dict(known)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    readers = Counter(network.get_output(index).name for index in range(network.num_outputs))
    for layer in layers:
        given = (layer.get_input(index) for index in range(layer.num_inputs))
        readers.update(tensor.name for tensor in given if tensor is not None)
    ends = [(kind_of(layer, module), layer.get_input(0), layer.get_output(0)) for layer in layers if layer.num_inputs]
    for kind, before, after in ends:  # towards the outputs
        if kind in _MOVING and before.name in found:
            found.setdefault(after.name, found[before.name])
    for kind, before, after in reversed(ends):  # towards the inputs
        if kind in (*_MOVING, "RELU") and after.name in found and readers[before.name] == 1:
            found.setdefault(before.name, found[after.name])
    return found


def _quantized_ranges(path: Path, trust_code: bool) -> dict[str, float]:
    try:
        from export.quantized_ranges import quantized_ranges

        return quantized_ranges(path, trust_code=trust_code)
    except ImportError as error:
        instead = ", or give the Q/DQ file that export.onnx makes of it" if path.suffix == ".qat" else ""
        raise UserError(
            f"reading the ranges of {path} needs another package: pip install {error.name}{instead}"
        ) from error


def _amax(path: Path, tensor: str, low: float, high: float) -> float:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{path}: the range of {tensor} is {low:g} to {high:g}, and must be finite: measure it again")
    if low > high:
        raise UserError(f"{path}: the range of {tensor} is {low:g} to {high:g}: min must be at most max")
    return max(abs(low), abs(high))


def _rows_of_csv(path: Path, text: str) -> Iterator[tuple[str, tuple[float, float]]]:
    rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
    if missing := {"tensor", "min", "max"} - set(rows.fieldnames or ()):
        raise UserError(f"{path} has no column {', '.join(sorted(missing))}: {_REMEDY}")
    for row in rows:
        yield _row(path, row["tensor"], row["min"], row["max"])


def _rows_of_json(path: Path, text: str) -> Iterator[tuple[str, tuple[float, float]]]:
    try:
        content = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): {_REMEDY}") from error
    rows = content.items() if isinstance(content, dict) else enumerate(content)
    for key, entry in rows:
        if isinstance(entry, dict) and isinstance(content, list):
            yield _row(path, entry.get("tensor"), entry.get("min"), entry.get("max"))
        elif isinstance(entry, list) and len(entry) == 2 and isinstance(key, str):
            yield _row(path, key, *entry)
        else:
            raise UserError(f"{path}: the entry {str(key)[:60]} is no range: {_REMEDY}")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is there twice")
    return found


def _row(path: Path, tensor: Any, low: Any, high: Any) -> tuple[str, tuple[float, float]]:
    try:
        return str(tensor), (float(low), float(high))
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{path}: the range of {tensor} is {low!r} to {high!r}, and must be two numbers: correct it"
        ) from None
