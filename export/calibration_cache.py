"""TensorRT's calibration cache for Q/DQ nodes: the placement of the tensors that it knows, and their scales."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from qat.base.calibration_cache import CalibrationCache
from qat.base.console import say, warn
from qat.base.errors import UserError
from qat.fake_quantize.quantizer import SCALE_FLOOR
from qat.graph.network import Network
from qat.rules.kernel_profile import KernelProfile
from qat.rules.place import place
from qat.rules.placement import Placement


def placement_from_cache(
    network: Network,
    cache: Path,
    keep_float: Collection[str],
    profile: KernelProfile | None = None,
    *,
    calibrated: bool,
) -> tuple[Placement, dict[str, float]]:
    """The placement of the tensors that the cache knows, and the scales of its quantizers.

    A scale keeps its bits. Tensors that share a scale get the largest of theirs. Tensors that the cache lacks, or that
    have a scale of 0 there or one below the normal float32 numbers, stay in float, unless they will be ``calibrated``;
    each is warned of.

    Raises UserError as ``CalibrationCache.read`` does, and when the cache is for another network.
    """
    scales = CalibrationCache.read(cache).scales
    usable = {tensor: scale for tensor, scale in scales.items() if scale >= SCALE_FLOOR}
    unknown: set[str] = set()
    warned: set[str] = set()
    while True:  # without a tensor the placement is another one, which may want other tensors
        placement = place(network, keep_float, unknown, profile)
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
