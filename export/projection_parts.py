"""How parts of a linear layer's output lie in it: which features a part has, and what shape and order they get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """A tensor that holds ``features`` of a layer's output, all rows of them.

    A layer of these features alone, [..., features], becomes it when it is reshaped to ``shape``, in which -1 stands
    for what grows with the batch, and its axes are permuted to ``order``.
    """

    features: range
    shape: tuple[int, ...]
    order: tuple[int, ...]

    def for_any_batch(self, other: Part) -> Part | None:
        """This part, found for one batch, and ``other``, the same one found for another, for any; None if they differ.

        One axis at most may grow with the batch.
        """
        if self == other:
            return self
        if (self.features, self.order, len(self.shape)) != (other.features, other.order, len(other.shape)):
            return None
        growing = [a != b for a, b in zip(self.shape, other.shape, strict=True)]
        shape = tuple(-1 if grows else extent for grows, extent in zip(growing, self.shape, strict=True))
        return Part(self.features, shape, self.order) if sum(growing) == 1 else None


def part_of(found: np.ndarray, shape: Sequence[int]) -> Part | None:
    """The part that ``found`` is; None if it is no plain one.

    Args:
        found: for each of its values, the position in the layer's output, counted in the order of memory.
        shape: of the layer's output.
    """
    width, rows = shape[-1], math.prod(shape[:-1])
    row, column = np.divmod(found, width)
    features = range(int(column.min()), int(column.max()) + 1)
    if found.size != rows * len(features) or found.ndim < 2:
        return None
    positions = row * len(features) + column - features.start
    origin = positions.flat[0]
    strides = [
        int(positions.take(1, axis).flat[0] - origin) if extent > 1 else 0 for axis, extent in enumerate(found.shape)
    ]
    by_stride = sorted(range(found.ndim), key=lambda axis: (-strides[axis], axis))
    extents = tuple(found.shape[axis] for axis in by_stride)
    order = tuple(by_stride.index(axis) for axis in range(found.ndim))
    rebuilt = np.arange(positions.size).reshape(extents).transpose(order)
    return Part(features, extents, order) if np.array_equal(rebuilt, positions) else None


def are_whole(parts: Sequence[Part], width: int) -> bool:
    """Whether several parts, sorted by their features, are together all of a layer's output, and none twice."""
    ends = [0, *(part.features.stop for part in parts)]
    return len(parts) > 1 and [part.features.start for part in parts] == ends[:-1] and ends[-1] == width
