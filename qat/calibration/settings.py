"""How ranges are chosen in calibration: what commands and library calls pass on. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qat.base.choices import Calibrator, WeightCalibrator
from qat.base.errors import UserError


@dataclass(frozen=True)
class CalibrationSettings:
    """The methods for activations and for weights. Raises UserError where the percentile is out of range.

    ``percentile``: share of the values, in percent, that the method of that name keeps unclipped.
    """

    method: Calibrator = "mse"
    percentile: float = 99.99
    weight_method: WeightCalibrator = "max"

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise UserError(f"--percentile {self.percentile} is out of range: choose one above 0 and up to 100")
