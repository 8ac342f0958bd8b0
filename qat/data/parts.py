"""What a reader of a data set finds: its parts, and what is known of the images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qat.data.pixels import Pixels

NO_LABEL = -1


@dataclass(frozen=True)
class Part:
    """Images and their labels: int64 [N]."""

    pixels: Pixels
    labels: Tensor


@dataclass(frozen=True)
class Source:
    """What a reader found. A part that the source does not have is None.

    ``default_size`` is (height, width) in pixels, None for photographs; ``cropped``: all images have one size and are
    taken whole, without a margin to crop in evaluation; ``mirrors``: the mirror image of a class still belongs to it.
    """

    train: Part
    validation: Part | None
    test: Part | None
    class_names: tuple[str, ...]
    default_size: tuple[int, int] | None
    cropped: bool = True
    mirrors: bool = True
    notes: tuple[str, ...] = ()
