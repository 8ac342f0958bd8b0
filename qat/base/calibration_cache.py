"""Reads TensorRT's calibration cache: the scales that implicit INT8 is built with.

TensorRT 10 and older write it as text: a header, then one line for each tensor, with its name and the bits of a float32
in hexadecimal. The float is the scale of the tensor: amax / 127.

    TRT-8601-EntropyCalibration2
    input: 3caa1f6d
    conv1_output: 3d0a2c51
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

from qat.base.errors import UserError

_HEADER = "TRT-"


def read_calibration_cache(path: Path) -> dict[str, float]:
    """The scale of every tensor in the cache: >= 0, in the unit of the tensor, exactly the float32 that it holds.

    A scale of 0, or below the normal numbers, is that of a tensor that was zero in calibration; nothing can be
    quantized by it.

    Raises UserError when the file cannot be read, is not a calibration cache, or holds a scale that is negative or not
    finite.
    """
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the calibration cache {path} ({error}): check the path") from error
    if not header.startswith(_HEADER):
        raise UserError(
            f"{path} is not a calibration cache of TensorRT: its first line is {header[:40]!r}, and should be "
            f"{_HEADER}<version>-...: give the cache that a builder of TensorRT 10 or older wrote"
        )
    scales = {}
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        name, separator, digits = line.rpartition(": ")
        scale = _float_from_hex(digits) if separator else None
        if scale is None:
            raise UserError(
                f"{path}, line {number}: {line[:60]!r} is not 'tensor: scale' with a scale in hexadecimal: "
                "calibrate again"
            )
        if not (math.isfinite(scale) and scale >= 0):
            raise UserError(
                f"{path}, line {number}: the scale of {name} is {scale:g}, and must be finite and not negative: "
                "calibrate again"
            )
        scales[name] = scale
    if not scales:
        raise UserError(f"{path} does not hold any tensor: calibrate again")
    return scales


def _float_from_hex(digits: str) -> float | None:
    """``3caa1f6d`` -> 0.0207...; None for anything that is not hexadecimal."""
    try:
        return float(struct.unpack("!f", struct.pack("!I", int(digits, 16)))[0])
    except (ValueError, struct.error):
        return None
