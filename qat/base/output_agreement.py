"""How well two networks agree on an output: floating-point values by their SQNR, all others by how many are equal.

Needs neither torch nor onnx.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qat.base.sqnr import sqnr_db as ratio
from qat.base.text import decibels


@dataclass(frozen=True)
class OutputAgreement:
    """An output of two networks on the same inputs.

    Attributes:
        tensor: its name.
        sqnr_db: the signal-to-noise ratio of floating-point values, in dB; None if all are equal.
        equal_percent: the share of equal values, of integers and of other values that have no such ratio: their shapes
            differ, one is NaN or infinity where the other is not, or all of the first are 0. None if they have one.
    """

    tensor: str
    sqnr_db: float | None = None
    equal_percent: float | None = None

    @classmethod
    def measure(cls, tensor: str, exact: np.ndarray, other: np.ndarray) -> OutputAgreement:
        """Compares the answers of two networks, [N, ...]."""
        sums = OutputSums(tensor)
        sums.add(exact, other)
        return sums.agreement()

    def reaches(self, least_db: float, least_percent: float) -> bool:
        """Whether the ratio is at least ``least_db``, or the share of equal values at least ``least_percent``."""
        if self.equal_percent is not None:
            return self.equal_percent >= least_percent
        return self.sqnr_db is None or self.sqnr_db >= least_db

    @property
    def measured(self) -> str:
        """The ratio or the share, in words."""
        if self.equal_percent is not None:
            return f"{self.equal_percent:.2f} % of the values equal"
        return decibels(self.sqnr_db)

    def __str__(self) -> str:
        return f"{self.tensor} {self.measured}"


class OutputSums:
    """Sums over batches of an output of two networks."""

    def __init__(self, tensor: str) -> None:
        self._tensor, self._have_ratio = tensor, True
        self._signal = self._noise = 0.0
        self._equal = self._count = 0

    def add(self, exact: np.ndarray, other: np.ndarray) -> None:
        """Adds a batch, [N, ...]."""
        self._count += max(exact.size, other.size)
        self._have_ratio = self._have_ratio and _have_ratio(exact, other)
        if exact.shape == other.shape:
            self._equal += int((exact == other).sum())
        if self._have_ratio:
            finite = np.isfinite(exact)
            signal, noisy = (values[finite].astype(np.float64) for values in (exact, other))
            self._signal += float(np.square(signal).sum())
            self._noise += float(np.square(signal - noisy).sum())

    def agreement(self) -> OutputAgreement:
        """How well the two agree on all batches."""
        if self._have_ratio and (self._signal or not self._noise):
            return OutputAgreement(self._tensor, ratio(self._signal, self._noise))
        return OutputAgreement(self._tensor, None, 100 * self._equal / self._count if self._count else 100.0)


def _have_ratio(exact: np.ndarray, other: np.ndarray) -> bool:
    """Whether both are floating-point values of one shape, and what is NaN or infinity in one is the same in both."""
    floating = np.issubdtype(exact.dtype, np.floating) and np.issubdtype(other.dtype, np.floating)
    if not floating or exact.shape != other.shape:
        return False
    odd = ~(np.isfinite(exact) & np.isfinite(other))
    return np.array_equal(exact[odd], other[odd], equal_nan=True)
