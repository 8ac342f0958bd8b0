"""Which kernels the GPU runs, by name and time, as CUPTI reports them.

The engine inspector lists a part of the network that another compiler handles as one layer, which can be a whole
transformer. Its kernels show what is inside. Needs NVIDIA's package cupti-python.

Names are those that were seen on an H200 (tests/deploy/test_compiled_parts.py): ``sm90_xmma_gemm_i8f32_i8i32_f32_...``
multiplies INT8 codes and writes float32, ``..._i8i8_...`` writes codes; ``mha7`` computes a whole attention;
``__myl_bb0_58_AddMeaSub...`` lists pointwise operations by three letters each, and with ``RouCas``, rounding and a
cast, it writes codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qat.base.errors import UserError
from qat.base.number_format import INT8

INSTALL = "pip install cupti-python"
_BUFFER_BYTES = 8 * 2**20
_PRODUCT = re.compile(r"gemm|gemv|conv|fprop|xmma", re.IGNORECASE)
_ATTENTION = re.compile(r"mha")
_TYPE = re.compile(r"_(i8|int8|bf16|tf32|fp?16|fp?32)")
_TYPES = {"i8": INT8.name, "int8": INT8.name, "bf16": "BF16", "tf32": "TF32", "f16": "FP16", "fp16": "FP16"}
_WRITES_CODES = re.compile(r"_i8i8_|RouCas")
_NUMBERS = re.compile(r"(?<=__myl_)bb\d+_\d+_|(?<=^mha)\d+$")
_MOVES = re.compile(r"^__myl_bb\d+_\d+_(?:Mov|Res|Tra|Sli|Rep|Gat|Con)+$")


@dataclass(frozen=True)
class Kernel:
    """One kernel that ran: its name in the compiled code, and how long it took."""

    name: str
    microseconds: float

    @property
    def is_attention(self) -> bool:
        """Whether it computes both products of an attention and the softmax between them."""
        return _ATTENTION.search(self.name) is not None

    @property
    def multiplies(self) -> bool:
        """Whether it computes a convolution, a matrix product or an attention."""
        return self.is_attention or (_PRODUCT.search(self.name) is not None and not self.name.startswith("__myl"))

    @property
    def type(self) -> str:
        """What a convolution or a matrix product multiplies, such as ``INT8``; ``unknown`` if its name has no type."""
        match = _TYPE.search(self.name)
        return _TYPES.get(match[1], "FP32") if match else "unknown"

    @property
    def writes_codes(self) -> bool:
        """Whether it writes INT8 codes."""
        return _WRITES_CODES.search(self.name) is not None

    @property
    def short_name(self) -> str:
        """Its name without what differs between kernels of a kind: numbers and tile sizes."""
        return _NUMBERS.sub("", self.name).split("_tilesize")[0]

    @property
    def only_moves(self) -> bool:
        """Whether it moves data as it is."""
        return _MOVES.match(self.name) is not None


@contextmanager
def recorded_kernels() -> Iterator[list[Kernel]]:
    """The kernels that run while the block does, in their order. The list is filled when the block ends.

    Raises UserError when CUPTI cannot be loaded, or does not work with this driver.
    """
    cupti = _cupti()
    kind, found, records = cupti.ActivityKind.CONCURRENT_KERNEL, list[Kernel](), list[tuple[int, Kernel]]()

    def completed(activities: list[Any]) -> None:
        for one in activities:
            if one.kind == kind:
                records.append((one.start, Kernel(one.name, (one.end - one.start) / 1000)))

    try:
        cupti.activity_register_callbacks(lambda: (_BUFFER_BYTES, 0), completed)
        cupti.activity_enable(kind)
    except Exception as error:  # whatever type its version raises
        raise UserError(f"CUPTI does not work with this driver: {error}") from error
    try:
        yield found
    finally:
        cupti.activity_flush_all(1)
        cupti.activity_disable(kind)
    found += [kernel for _, kernel in sorted(records, key=lambda record: record[0])]


def _cupti() -> Any:
    try:
        from cupti import cupti
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"CUPTI cannot be loaded ({error}): {INSTALL}") from error
    return cupti
