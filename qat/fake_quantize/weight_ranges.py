"""Ranges of weights: they follow the weights, are fixed, or are learned. None of this needs images."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from qat.base.number_format import NumberFormat
from qat.fake_quantize.prepare import activation_quantizers, weights_and_quantizers
from qat.fake_quantize.quantizer import WEIGHT, quantize, scale_from_amax, weight_amax, weight_rows


def weight_amax_mse(
    weight: Tensor, axis: int | None, number_format: NumberFormat = WEIGHT, candidates: int = 100
) -> Tensor:
    """For each channel of ``axis``, the range with the least mean squared quantization error: [C], float32.

    For all weights together, [], if ``axis`` is None. A range is one of ``candidates`` equally spaced values up to the
    largest magnitude; if errors are equal, the largest.
    """
    rows = weight_rows(weight, axis).float()  # [C, K] or [K]
    largest = weight_amax(weight, axis)  # [C] or []
    best, least = largest.clone(), torch.full_like(largest, math.inf)
    for step in range(candidates, 0, -1):
        amax = largest * (step / candidates)
        scale = scale_from_amax(amax, number_format)[..., None]
        error = (quantize(rows, scale, number_format) * scale - rows).square().mean(-1)
        best, least = torch.where(error < least, amax, best), torch.minimum(error, least)
    return best


def fix_saved_ranges(prepared: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
    """Fixes the weight ranges that ``tensors`` of a saved model hold, so that they can be loaded into ``prepared``."""
    for path, weight, quantizer in weights_and_quantizers(prepared):
        amax = tensors.get(f"{path}.amax")
        if amax is not None and amax.shape == quantizer.scale(weight).shape:
            quantizer.fix(amax.to(weight.device))


def fix_weight_ranges(prepared: fx.GraphModule, keep: Collection[str] = ()) -> None:
    """Fixes all ranges that follow their weights at the least squared error, except of the quantizers in ``keep``."""
    for path, weight, quantizer in weights_and_quantizers(prepared):
        if quantizer.amax is None and path not in keep:
            quantizer.fix(weight_amax_mse(weight, quantizer.axis, quantizer.format))


def learn_ranges(prepared: fx.GraphModule) -> None:
    """Makes the ranges of all quantizers parameters; weight ranges start at the least squared quantization error."""
    fix_weight_ranges(prepared)
    for _, _, quantizer in weights_and_quantizers(prepared):
        quantizer.learn()
    for activation in activation_quantizers(prepared).values():
        activation.learn()
