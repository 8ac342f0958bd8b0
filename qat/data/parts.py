"""What a reader of a data set returns: its parts, and what is known about the images."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from qat.data.pixels import Pixels, in_grey

NO_LABEL = -1


@dataclass(frozen=True)
class Part:
    """Images and their labels: int64 [N]."""

    pixels: Pixels
    labels: Tensor


@dataclass(frozen=True)
class Source:
    """What a reader found. A part that the source does not have is None.

    ``default_size`` is (height, width) in pixels, None for photographs. ``cropped``: all images have the same size and
    are used whole; evaluation crops no margin. ``mirrors``: mirroring an image does not change its class.
    ``all_classes``: False if ``class_names`` are only the numbers up to the highest label, so that there may be more.
    """

    train: Part
    validation: Part | None
    test: Part | None
    class_names: tuple[str, ...]
    default_size: tuple[int, int] | None
    cropped: bool = True
    mirrors: bool = True
    notes: tuple[str, ...] = ()
    all_classes: bool = True

    def in_grey(self) -> Source:
        """The same with images of one channel."""
        parts = {name: getattr(self, name) for name in ("train", "validation", "test")}
        return replace(
            self, **{name: part and replace(part, pixels=in_grey(part.pixels)) for name, part in parts.items()}
        )
