"""The settings of calibration, as commands and library calls pass them on. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass

from qat.base.choices import Calibrator, WeightCalibrator
from qat.base.errors import UserError


@dataclass(frozen=True)
class CalibrationSettings:
    """The methods for activation and weight ranges. Raises UserError when a number is out of range.

    ``percentile``: percentage of the values that the method of that name leaves unclipped. ``smoothquant``: alpha of
    SmoothQuant, which is done before; None: it is not done.
    """

    method: Calibrator = "mse"
    percentile: float = 99.99
    weight_method: WeightCalibrator = "max"
    smoothquant: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise UserError(f"--percentile {self.percentile} is out of range: it must be above 0 and at most 100")
        if self.smoothquant is not None and not 0 <= self.smoothquant <= 1:
            raise UserError(f"--smoothquant {self.smoothquant} is out of range: it must be within 0 to 1")
