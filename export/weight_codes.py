"""Codes for the weights of a float ONNX graph, by the numerics of training (qat/fake_quantize/quantizer.py)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from export.insert import WeightCodes
from qat.base.choices import WeightCalibrator
from qat.base.number_format import NumberFormat
from qat.fake_quantize.quantizer import SCALE_FLOOR, per_channel, quantize, scale_from_amax, weight_amax
from qat.fake_quantize.weight_ranges import weight_amax_mse


class WeightQuantizer:
    """Chooses the ranges of weights: ``calibrator`` max, or mse for the least squared quantization error.

    Attributes:
        dead: how many channels were zero so far; their scales were floored.
    """

    def __init__(self, calibrator: WeightCalibrator, number_format: NumberFormat) -> None:
        self._calibrator, self._format, self.dead = calibrator, number_format.narrow(), 0

    def __call__(self, weight: ir.Value, axis: int | None) -> WeightCodes:
        """The codes of a constant, with a scale for each channel of ``axis``, or one if it is None."""
        assert weight.const_value is not None
        given = torch.from_numpy(np.array(weight.const_value.numpy(), np.float32))
        by_mse = self._calibrator == "mse"
        amax = weight_amax_mse(given, axis, self._format) if by_mse else weight_amax(given, axis)
        scale = scale_from_amax(amax, self._format)
        codes = quantize(given, per_channel(scale, given.ndim, axis), self._format)
        self.dead += int((scale <= SCALE_FLOOR).sum())
        return WeightCodes(codes.numpy(), scale.numpy(), axis)
