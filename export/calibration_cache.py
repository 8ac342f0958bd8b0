"""Reads TensorRT's calibration cache: the scales that implicit INT8 was built with, for use in Q/DQ nodes.

TensorRT 10 and older write it as text: a header, then one line for each tensor, with its name and the bits of a float32
in hexadecimal. The float is the scale of the tensor: amax / 127.

    TRT-8601-EntropyCalibration2
    input: 3caa1f6d
    conv1_output: 3d0a2c51
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping
from pathlib import Path

from qat.base.console import say, warn
from qat.base.errors import UserError
from qat.fake_quantize.quantizer import SCALE_FLOOR
from qat.graph.network import Network
from qat.rules.place import place
from qat.rules.placement import Placement

_HEADER = "TRT-"


def placement_from_cache(
    network: Network, cache: Path, keep_float: Collection[str], *, calibrated: bool
) -> tuple[Placement, dict[str, float]]:
    """The placement of the tensors that the cache knows, and the scales of its quantizers.

    A scale keeps its bits. Tensors that share a scale get the largest of theirs. Tensors that the cache lacks, or that
    have a scale of 0 there or one below the normal float32 numbers, stay in float, unless they will be ``calibrated``;
    each is warned of.

    Raises UserError as ``read_calibration_cache`` does, and when the cache is for another network.
    """
    scales = read_calibration_cache(cache)
    usable = {tensor: scale for tensor, scale in scales.items() if scale >= SCALE_FLOOR}
    unknown: set[str] = set()
    warned: set[str] = set()
    while True:  # without a tensor the placement is another one, which may want other tensors
        placement = place(network, keep_float, unknown)
        found: dict[str, float] = {}
        for tensor in placement.tensors:
            if tensor.tensor in usable:
                found[tensor.quantizer] = max(found.get(tensor.quantizer, 0.0), usable[tensor.tensor])
        if not unknown:
            _check_network(placement, scales, cache)
        for tensor in placement.tensors:
            if tensor.tensor not in usable and tensor.tensor not in warned:
                warned.add(tensor.tensor)
                _warn_of(tensor.tensor, scales, shared=tensor.quantizer in found, calibrated=calibrated)
        missing = {tensor.tensor for tensor in placement.tensors if tensor.quantizer not in found}
        if calibrated or not missing:
            return placement, found
        unknown |= missing


def _check_network(placement: Placement, scales: Mapping[str, float], cache: Path) -> None:
    """Says how many tensors the cache knows. Raises UserError when it lacks most of them."""
    wanted = [tensor.tensor for tensor in placement.tensors]
    known = [tensor for tensor in wanted if tensor in scales]
    if 2 * len(known) < len(wanted):
        raise UserError(
            f"{cache} is a cache for another network: it knows {len(known)} of the {len(wanted)} tensors to quantize "
            f"({', '.join(wanted[:3])}, ...), and others ({', '.join(list(scales)[:3])}, ...): give its own cache"
        )
    say(f"calibration cache: {len(known)} of {len(wanted)} tensors found")


def _warn_of(tensor: str, scales: Mapping[str, float], *, shared: bool, calibrated: bool) -> None:
    """Says why the cache has no scale to quantize ``tensor`` by, and what follows."""
    why = "not in the cache, or renamed by fusion"
    if tensor in scales:
        why = f"its scale in the cache is {scales[tensor]:.3g}, by which nothing can be quantized"
    then = "calibrated on the data" if calibrated else "what reads it stays in float"
    warn(f"{why}: {tensor} ({'it shares the scale of one that is there' if shared else then})")


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
