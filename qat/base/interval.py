"""How well a share is known that was counted on a sample, and whether it is more than chance."""

from __future__ import annotations

import math

_DEVIATIONS = 1.959964  # of a normal distribution, on both sides of 95 %
_TIMES_CHANCE = 1.5


def is_near_chance(top1: float, classes: int) -> bool:
    """Whether an accuracy, in percent, is less than 1.5 times that of guessing one of ``classes``."""
    return classes > 1 and top1 < _TIMES_CHANCE * 100 / classes


def interval_of_share(count: int, total: int) -> tuple[float, float]:
    """The interval, 0 to 1, that holds a share with 95 % confidence when ``count`` of ``total`` were counted.

    Wilson's score interval (E. B. Wilson, 1927). ``total`` must be at least 1.
    """
    square = _DEVIATIONS**2
    share = count / total
    center = (share + square / (2 * total)) / (1 + square / total)
    half = _DEVIATIONS / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    return max(0.0, center - half), min(1.0, center + half)


def share_in_percent(count: int, total: int) -> str:
    """``80.84 % (77.8 to 83.5)``: a share with the interval of 95 % confidence."""
    low, high = interval_of_share(count, total)
    return f"{100 * count / total:.2f} % ({100 * low:.1f} to {100 * high:.1f})"
