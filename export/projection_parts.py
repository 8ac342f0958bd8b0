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


def part_of(found: np.ndarray, shape: Sequence[int], growing: int) -> Part | None:
    """The part that ``found`` is; None if it is no plain one.

    Args:
        found: for each of its values, the position in the layer's output, counted in the order of memory.
        shape: of the layer's output.
        growing: its axis that grows with the batch.
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
    extents = [found.shape[axis] for axis in by_stride]
    order = tuple(by_stride.index(axis) for axis in range(found.ndim))
    rebuilt = np.arange(positions.size).reshape(extents).transpose(order)
    of_batch = math.prod(shape[growing + 1 : -1]) * len(features)
    if not np.array_equal(rebuilt, positions) or of_batch not in strides:
        return None
    free = by_stride.index(strides.index(of_batch))
    return Part(features, tuple(-1 if at == free else extent for at, extent in enumerate(extents)), order)


def are_whole(parts: Sequence[Part], width: int) -> bool:
    """Whether several parts, sorted by their features, are together all of a layer's output, and none twice."""
    ends = [0, *(part.features.stop for part in parts)]
    return len(parts) > 1 and [part.features.start for part in parts] == ends[:-1] and ends[-1] == width
