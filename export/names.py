"""Finds names that are not taken yet."""

from __future__ import annotations

from collections.abc import Container


def unused_name(name: str, taken: Container[str]) -> str:
    """``name``, or ``name_1``, ``name_2``, ...: the first of these that is not ``taken``."""
    serial, unique = 0, name
    while unique in taken:
        serial += 1
        unique = f"{name}_{serial}"
    return unique
