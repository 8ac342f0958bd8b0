"""The leaves of the files: numbers within what the program can work with, and texts."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**53)]
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Extent = Annotated[int, Meta(ge=-1, le=2**31 - 1)]  # -1: any
Shape = Annotated[tuple[Extent, ...], Meta(max_length=32)]
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]
Positive = Annotated[float, Meta(gt=1e-12, le=1e30)]
Share = Annotated[float, Meta(ge=0, le=100)]  # percent
Name = Annotated[str, Meta(min_length=1, max_length=4096)]
FileName = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[^/]*[^/.][^/]*$")]  # in the same folder
NumpyType = Annotated[
    str, Meta(pattern=r"^(bool|bfloat16|u?int(4|8|16|32|64)|float(16|32|64|8\w*)|fp8|fp4|string|str|object)$")
]
Digest = Annotated[str, Meta(max_length=64, pattern=r"^[0-9a-f]*$")]
