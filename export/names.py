"""Names that are not taken yet."""

from __future__ import annotations

from collections.abc import Container


def unused_name(name: str, taken: Container[str]) -> str:
    """``name``, or with the least number behind it that is not ``taken``: name_1."""
    serial, unique = 0, name
    while unique in taken:
        serial += 1
        unique = f"{name}_{serial}"
    return unique
