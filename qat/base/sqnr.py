"""Signal-to-quantization-noise ratio (SQNR), the only measure here of how close a quantized tensor is to the exact one.

    SQNR = 10 log10(sum x^2 / sum (x - x_hat)^2)   in dB

The caller computes the two sums in float64, in PyTorch or NumPy, possibly batch by batch.
"""

from __future__ import annotations

import math


def worst_first(ratio_db: float | None) -> float:
    """The key by which ratios in dB are sorted, the worst first: equality, which is None, comes last."""
    return math.inf if ratio_db is None else ratio_db


def sqnr_db(signal: float, noise: float) -> float | None:
    """The ratio in dB from ``signal`` = sum x^2 and ``noise`` = sum (x - x_hat)^2, both at least 0.

    None if there is no noise, which means equality; minus infinity if there is noise but no signal; NaN if the noise
    is infinite or NaN, as after an overflow.
    """
    if noise == 0:
        return None
    if not math.isfinite(noise):
        return math.nan
    return 10 * math.log10(signal / noise) if signal else -math.inf
