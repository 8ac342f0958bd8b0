"""Where an image lies in a letterbox: as large as it fits, in the middle. Standard library only."""

from __future__ import annotations


def extents_within(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The extents of the largest form of ``image`` that fits into ``size``, both in the same order, in pixels."""
    factor = min(wanted / extent for extent, wanted in zip(image, size, strict=True))
    first, second = (max(1, round(extent * factor)) for extent in image)
    return first, second
