"""The learning rate over a phase of training."""

from __future__ import annotations

import math

from qat.base.choices import Schedule

_WARM_UP: dict[Schedule, float] = {"one-cycle": 0.3, "cosine": 0.0}  # share of the phase
_START = 25  # the warm-up begins at the peak divided by this


def learning_rate(schedule: Schedule, peak: float, done: float) -> float:
    """The learning rate when the fraction ``done`` in [0, 1] of a phase is over; ``peak`` is the highest of all.

    one-cycle rises for three tenths of the phase and then falls to 0, both along half a cosine; cosine only falls.
    """
    warm_up = _WARM_UP[schedule]
    if done < warm_up:
        start = peak / _START
        return start + (peak - start) * (1 - math.cos(math.pi * done / warm_up)) / 2
    return peak * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2
