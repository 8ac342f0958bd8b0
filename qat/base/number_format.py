"""The number format that tensors are quantized to. A second one, FP8 for instance, would be defined here.

A format says which codes there are and what they are called: quantizers clamp to them, the export writes their ONNX
type, the lint asks for that type, and the audit looks for the format's name in what a builder reports.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class NumberFormat:
    """Symmetric integers: code = round(x / scale), clamped to ``low`` .. ``high``; zero point 0.

    Attributes:
        name: as builders and reports call it.
        low: the lowest code, at most 0.
        high: the highest code, above 0; the scale of a tensor is its largest magnitude divided by it.
        onnx_type: name of the codes' ONNX data type, '' where no file can hold them (a simulation of fewer bits).
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
        """The codes' type in NumPy's and PyTorch's words: ``int8``. Raises ValueError for a simulation."""
        if not self.onnx_type:
            raise ValueError(f"{self.name} is a simulation: no file holds its codes")
        return self.onnx_type.lower()

    @property
    def levels(self) -> int:
        """How many codes a magnitude can take: 0 .. ``high``."""
        return self.high + 1

    def narrow(self) -> NumberFormat:
        """Without the lowest code, so that the range is symmetric: what weights use."""
        return replace(self, low=-self.high)


INT8 = NumberFormat("INT8", -128, 127, "INT8")
EXPORTED = (INT8,)
"""The formats that an ONNX file can hold. Each has a ``dtype`` of its own, by which its codes are recognized."""
BITS = 8
"""Bits of the formats that can be exported."""


def low_bit_format(bits: int, *, signed: bool) -> NumberFormat:
    """A format of fewer bits, in two's complement, or from 0 on where it is not ``signed``. It cannot be exported."""
    name = f"INT{bits}" if signed else f"UINT{bits}"
    half = 2 ** (bits - 1)
    return NumberFormat(name, -half, half - 1, "") if signed else NumberFormat(name, 0, 2 * half - 1, "")


def format_of_codes(dtype: str) -> NumberFormat:
    """The format in ``EXPORTED`` whose codes have this type, in NumPy's words. Raises ValueError if none has."""
    for number_format in EXPORTED:
        if number_format.dtype == dtype:
            return number_format
    raise ValueError(f"no number format has codes of type {dtype}: choose from {', '.join(map(str, EXPORTED))}")
