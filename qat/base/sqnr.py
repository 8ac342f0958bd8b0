"""Signal-to-quantization-noise ratio, the one measure of how far a quantized tensor is from the exact one.

    SQNR = 10 log10(sum x^2 / sum (x - x_hat)^2)   in dB

Who holds the tensors computes the two sums, in float64: PyTorch, NumPy, batch by batch.
"""

from __future__ import annotations

import math


def sqnr_db(signal: float, noise: float) -> float | None:
    """The ratio in dB from ``signal`` = sum x^2 and ``noise`` = sum (x - x_hat)^2, both at least 0.

    None where there is no noise, which means equality; minus infinity where there is noise and no signal.
    """
    if noise == 0:
        return None
    return 10 * math.log10(signal / noise) if signal else -math.inf
