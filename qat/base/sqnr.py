"""Signal-to-quantization-noise ratio (SQNR), the only measure here of how close a quantized tensor is to the exact one.

    SQNR = 10 log10(sum x^2 / sum (x - x_hat)^2)   in dB

The caller computes the two sums in float64, in PyTorch or NumPy, possibly batch by batch.
"""

from __future__ import annotations

import math


def sqnr_db(signal: float, noise: float) -> float | None:
    """The ratio in dB from ``signal`` = sum x^2 and ``noise`` = sum (x - x_hat)^2, both at least 0.

    None if there is no noise, which means equality; minus infinity if there is noise but no signal, or if the noise is
    infinite or NaN, as after an overflow.
    """
    if noise == 0:
        return None
    if not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
