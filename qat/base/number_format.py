"""The number format that tensors are quantized to. A second format, FP8 for instance, would be defined here.

A format defines the range of codes and their names. Quantizers clamp to the range, the export writes the ONNX type, the
lint checks for that type, and the audit looks for the format's name in what a builder reports.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class NumberFormat:
    """Symmetric integers: code = round(x / scale), clamped to ``low`` .. ``high``; zero point 0.

    Attributes:
        name: its name in builders and reports.
        low: the lowest code, at most 0.
        high: the highest code, above 0; the scale of a tensor is its amax divided by ``high``.
        onnx_type: name of the codes' ONNX data type; '' for a simulation of fewer bits, which cannot be stored.
    """

    name: str
    low: int
    high: int
    onnx_type: str

    def __post_init__(self) -> None:
        if not -128 <= self.low <= 0 < self.high <= 127:
            raise ValueError(f"codes of {self.name} must lie in [-128, 127], got [{self.low}, {self.high}]")

    def __str__(self) -> str:
        return f"{self.name} codes {self.low}..{self.high}"

    @property
    def dtype(self) -> str:
        """NumPy's and PyTorch's name of the codes' type: ``int8``. Raises ValueError for a simulation."""
        if not self.onnx_type:
            raise ValueError(f"{self.name} is a simulation: its codes cannot be stored")
        return self.onnx_type.lower()

    @property
    def levels(self) -> int:
        """Number of codes that a magnitude can have: 0 .. ``high``."""
        return self.high + 1

    def narrow(self) -> NumberFormat:
        """The format without its lowest code, which makes the range symmetric: weights use it."""
        return replace(self, low=-self.high)


INT8 = NumberFormat("INT8", -128, 127, "INT8")
EXPORTED = (INT8,)
"""The formats that an ONNX file can hold. Each has a ``dtype`` of its own, by which its codes are recognized."""
BITS = 8
"""Bits of the formats that can be exported."""


def low_bit_format(bits: int, *, signed: bool) -> NumberFormat:
    """A format of fewer bits, in two's complement if ``signed``, else from 0 upwards. It cannot be exported."""
    name = f"INT{bits}" if signed else f"UINT{bits}"
    half = 2 ** (bits - 1)
    return NumberFormat(name, -half, half - 1, "") if signed else NumberFormat(name, 0, 2 * half - 1, "")


def format_of_codes(dtype: str) -> NumberFormat:
    """The format in ``EXPORTED`` whose codes have this type, in NumPy's words. Raises ValueError if none has."""
    for number_format in EXPORTED:
        if number_format.dtype == dtype:
            return number_format
    raise ValueError(f"no number format has codes of type {dtype}: choose from {', '.join(map(str, EXPORTED))}")
