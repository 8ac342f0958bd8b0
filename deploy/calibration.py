"""Where the ranges of implicit INT8 come from: by hand, from a calibration cache, or from a calibrator that is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.builder import open_network
from deploy.calibration_cache_file import CacheKey, CalibrationCacheFile, check_cache
from deploy.calibration_inputs import CalibrationInputs, calibration_inputs
from deploy.calibrator import Calibration
from deploy.dynamic_ranges import RangeTable, is_calibration_cache
from deploy.settings import BuildSettings, CalibrationSettings
from deploy.trt import Toolkit
from qat.base.artifact import Sidecar, check_writable
from qat.base.console import say


@dataclass(frozen=True)
class RangeSources:
    """``by_hand`` comes before what ``calibration`` finds; ``cache_file`` keeps that."""

    by_hand: RangeTable | None = None
    calibration: Calibration | None = None
    cache_file: CalibrationCacheFile | None = None
    inputs: CalibrationInputs | None = None

    def save(self) -> None:
        """Writes the calibration cache, if a build has calibrated."""
        if self.calibration and self.calibration.calibrated and self.cache_file:
            self.cache_file.save(self.calibration.cache)

    def to_json(self) -> dict[str, Any] | None:
        """What the sidecar of an engine records of them; None if there are none."""
        if self.by_hand is None and self.calibration is None:
            return None
        return {
            "by_hand": self.by_hand.source if self.by_hand else None,
            "calibrator": self.calibration.settings.method if self.calibration else None,
            "images": self.inputs.count if self.inputs else None,
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
) -> RangeSources:
    """What was asked for, read and checked before anything is built.

    Args:
        toolkit: the builder.
        model, sidecar, digest: the ONNX file, its sidecar if it has one, and its SHA-256.
        settings: those of the build.
        calibration: the calibrator, what it is fed, and its cache.
        ranges: a file of ranges by hand.

    Raises UserError when a file cannot be read or does not fit, and when this version has no such calibrator.
    """
    by_hand = None if ranges is None else RangeTable.read(ranges)
    if ranges is not None and is_calibration_cache(ranges):
        check_cache(ranges, digest)
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
