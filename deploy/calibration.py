"""Where the ranges of implicit INT8 come from: by hand, from a calibration cache, or from a calibrator that is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.builder import open_network
from deploy.calibration_cache_file import CacheKey, CalibrationCacheFile
from deploy.calibration_inputs import CalibrationInputs, calibration_inputs
from deploy.calibrator import Calibration
from deploy.dynamic_ranges import RangeTable, is_calibration_cache
from deploy.settings import BuildSettings, CalibrationSettings
from deploy.trt import Toolkit
from qat.base.artifact import Sidecar
from qat.base.calibration_cache import check_cache
from qat.base.console import say, warn
from qat.base.text import did_you_mean
from qat.base.writing import check_writable


@dataclass(frozen=True)
class RangeSources:
    """``by_hand`` comes before what ``calibration`` finds; ``cache_file`` keeps that."""

    by_hand: RangeTable | None = None
    calibration: Calibration | None = None
    cache_file: CalibrationCacheFile | None = None
    inputs: CalibrationInputs | None = None

    @contextmanager
    def saved(self) -> Iterator[None]:
        """After a block that builds, writes the calibration cache if it has calibrated, though the build may fail."""
        try:
            yield
        finally:
            if self.calibration and self.calibration.calibrated and self.cache_file:
                self.cache_file.save(self.calibration.cache, self.calibration.images)

    def to_json(self) -> dict[str, Any] | None:
        """What the sidecar of an engine records of them; None if there are none."""
        if self.by_hand is None and self.calibration is None:
            return None
        return {
            "by_hand": self.by_hand.source if self.by_hand else None,
            "calibrator": self.calibration.settings.method if self.calibration else None,
            "images": self.calibration.images if self.calibration and self.inputs else None,
            "images_sha256": self.inputs.digest if self.inputs else None,
            "from_cache": bool(self.calibration and not self.calibration.calibrated),
        }


def range_sources(
    toolkit: Toolkit,
    model: Path,
    sidecar: Sidecar | None,
    digest: str,
    settings: BuildSettings,
    calibration: CalibrationSettings | None,
    ranges: Path | None,
    *,
    trust_code: bool = False,
) -> RangeSources:
    """What was asked for, read and checked before anything is built.

    Args:
        toolkit: the builder.
        model, sidecar, digest: the ONNX file, its sidecar if it has one, and its SHA-256.
        settings: those of the build.
        calibration: the calibrator, what it is fed, and its cache.
        ranges: a file of ranges by hand.
        trust_code: run the code that a stranger's checkpoint of ranges names.

    Raises UserError when a file cannot be read or does not fit, and when this version has no such calibrator.
    """
    by_hand = None if ranges is None else RangeTable.read(ranges, trust_code=trust_code)
    if ranges is not None and is_calibration_cache(ranges):
        check_cache(ranges, digest)
    if by_hand is not None:
        with open_network(toolkit, model, settings) as network:
            _warn_of_unknown(by_hand, [*(spec.name for spec in network.inputs), *network.makers])
    if calibration is None or not calibration.asked_for:
        return RangeSources(by_hand)
    toolkit.calibrator_class(calibration.calibrator)
    path = calibration.calibration_cache
    if calibration.trust_cache and path is not None:
        cached = RangeTable.read(path)
        say(f"calibration cache {path}: used as it is, whatever it was made of")
        return RangeSources(by_hand.over(cached) if by_hand else cached)
    if path is not None and not path.is_file():
        check_writable(path)
    inputs = None
    if calibration.data is not None:
        with open_network(toolkit, model, settings) as network:
            inputs = calibration_inputs(calibration, network.inputs, sidecar)
        say(f"{calibration.calibrator} calibration on {inputs.count} images of {inputs.source}")
    cache_file = None
    if path is not None:
        key = CacheKey(digest, inputs.digest if inputs else None, calibration.method, toolkit.version)
        cache_file = CalibrationCacheFile(path, key)
    content = cache_file.content if cache_file else b""
    return RangeSources(by_hand, Calibration(calibration, inputs, content), cache_file, inputs)


def _warn_of_unknown(table: RangeTable, tensors: list[str]) -> None:
    """Warns of ranges for tensors that the network does not have."""
    unknown = table.unknown(tensors)
    if unknown:
        more = f" and {len(unknown) - 1} more tensors" if len(unknown) > 1 else ""
        warn(
            f"{table.source} has ranges for {unknown[0]!r}{did_you_mean(unknown[0], tensors)}{more}, which the network "
            "does not have: they are not used"
        )
