"""Reads TensorRT's calibration cache: the scales that implicit INT8 is built with.

TensorRT 10 and older write it as text: a header, then one line for each tensor, with its name and the bits of a float32
in hexadecimal, without leading zeros. The float is the scale of the tensor: amax / 127. The legacy calibrator's header
has three numbers instead: the last two are the bits of its regression cutoff and its quantile, both float64.

    TRT-8601-EntropyCalibration2            0 3ff0000000000000 3fefff2e48e8a71e
    input: 3caa1f6d                         input: 3cfa15fa
    conv1_output: 3d0a2c51                  conv1_output: 3cbfc202
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from qat.base.artifact import read_sidecar, sidecar_path
from qat.base.choices import ImplicitCalibrator
from qat.base.console import say
from qat.base.errors import UserError
from qat.base.regular_file import read_bytes

MOST_BYTES = 64 << 20
"""Of a calibration cache; each tensor is a line."""
_HEADER = re.compile(r"TRT-(?P<version>\d+)-(?P<algorithm>\w+)|\d+ [0-9a-f]{1,16} [0-9a-f]{1,16}")
_ALGORITHMS: dict[str, ImplicitCalibrator] = {
    "EntropyCalibration2": "entropy2",
    "MinMaxCalibration": "minmax",
    "EntropyCalibration": "entropy",
}


@dataclass(frozen=True)
class CalibrationCache:
    """What a calibration cache holds.

    Attributes:
        scales: of every tensor: >= 0, in the unit of the tensor, exactly the float32 that the cache holds. A scale of
            0, or below the normal numbers, is that of a tensor that was zero in calibration; nothing can be quantized
            by it.
        calibrator: which one wrote it; None if it is not known.
    """

    scales: dict[str, float]
    calibrator: ImplicitCalibrator | None

    @classmethod
    def read(cls, path: Path) -> CalibrationCache:
        """Raises UserError when the file cannot be read, is no calibration cache, or has a scale that is none."""
        try:
            content = read_bytes(path, MOST_BYTES)
        except OSError as error:
            raise UserError(f"cannot read the calibration cache {path} ({error}): check the path") from error
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, source: str) -> CalibrationCache:
        """From the bytes of a cache, which messages call ``source``. Raises UserError as ``read`` does."""
        try:
            # Only line feeds end a line: str.splitlines would also split at rare characters in names.
            header, *lines = (line.removesuffix("\r") for line in content.decode().split("\n"))
        except UnicodeDecodeError as error:
            raise UserError(f"{source} is not a calibration cache of TensorRT, which is text ({error})") from error
        if not (match := _HEADER.fullmatch(header)):
            raise UserError(
                f"{source} is not a calibration cache of TensorRT: its first line is {header[:40]!r}, and should be "
                "TRT-<version>-<algorithm>: give the cache that a builder of TensorRT 10 or older wrote"
            )
        scales = {}
        for number, line in enumerate(lines, 2):
            if not line.strip():
                continue
            name, separator, digits = line.rpartition(": ")
            scale = _float_from_hex(digits) if separator else None
            if scale is None:
                raise UserError(
                    f"{source}, line {number}: {line[:60]!r} is not 'tensor: scale' with a scale in hexadecimal: "
                    "calibrate again"
                )
            if not (math.isfinite(scale) and scale >= 0):
                raise UserError(
                    f"{source}, line {number}: the scale of {name} is {scale:g}, and must be finite and not negative: "
                    "calibrate again"
                )
            scales[name] = scale
        if not scales:
            raise UserError(f"{source} does not hold any tensor: calibrate again")
        return cls(scales, _ALGORITHMS.get(match["algorithm"]) if match["algorithm"] else "legacy")


def looks_like_calibration_cache(text: str) -> bool:
    """Whether a file that starts with ``text`` is meant to be a calibration cache."""
    return _HEADER.match(text) is not None


def _float_from_hex(digits: str) -> float | None:
    """``3caa1f6d`` -> 0.0207...; None for anything that is not hexadecimal."""
    if not re.fullmatch("[0-9a-fA-F]{1,8}", digits):
        return None
    return float(struct.unpack("!f", struct.pack("!I", int(digits, 16)))[0])


def check_cache(path: Path, model: str) -> None:
    """Raises UserError for a cache that its sidecar shows to be damaged, or made of another model than ``model``.

    ``model`` is a SHA-256 in hexadecimal. Of a cache without a sidecar nothing is known, which is said.
    """
    if not sidecar_path(path).exists():
        say(f"the calibration cache {path} has no sidecar, so nothing tells whether it was made of this model")
        return
    recorded = read_sidecar(path, "calibration-cache").details
    if recorded.get("model") != model:
        raise UserError(f"the calibration cache {path} was made of another model: give the one of this model")
