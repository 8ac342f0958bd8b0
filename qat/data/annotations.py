"""An image with boxes or with a mask, and a set of them. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from qat.base.errors import UserError

Split = Literal["train", "val"]
NO_CLASS = 255
"""The value of a mask's pixels that count neither as right nor as wrong."""
_PAIRS = (("images", "masks"), ("JPEGImages", "SegmentationClass"))
_PIXELS, _SHARE = 1.0, 0.01  # by which a box may reach over the edge: rounding of those who drew it


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """An image file with n boxes, or with a mask.

    Attributes:
        file: the image.
        boxes: float64 [n, 4], left, top, right, bottom in pixels of the upright image.
        labels: int64 [n], places in the set's ``class_names``.
        crowd: bool [n], boxes around many objects, which a detector need not find (COCO's iscrowd).
        mask: a file with the class of each pixel; '' for an image with boxes.
    """

    file: str
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    mask: str = ""


@dataclass(frozen=True)
class AnnotatedSet:
    """Annotated images.

    Attributes:
        source: what they are, for messages.
        images: in the order of the set.
        class_names: of the boxes; () where the masks' classes have no names.
        category_ids: the numbers that the classes have in a file of COCO, ascending; () elsewhere.
    """

    source: str
    images: tuple[AnnotatedImage, ...]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] = ()

    @property
    def masks(self) -> bool:
        """Whether the images have masks; if not, they have boxes."""
        return bool(self.images[0].mask)


def with_boxes(
    file: str, boxes: Sequence[Sequence[float]], labels: Sequence[int], crowd: Sequence[bool]
) -> AnnotatedImage:
    """An image with boxes, as lists."""
    found = np.array(boxes, np.float64).reshape(-1, 4)
    return AnnotatedImage(file, found, np.array(labels, np.int64), np.array(crowd, bool))


def with_mask(file: str, mask: str) -> AnnotatedImage:
    """An image whose mask is the file ``mask``."""
    return AnnotatedImage(file, np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool), mask)


def folders_of_masks(folder: Path) -> tuple[Path, Path] | None:
    """The folders of images and of their masks within ``folder``; None if it has no such two."""
    for images, masks in _PAIRS:
        if (folder / images).is_dir() and (folder / masks).is_dir():
            return folder / images, folder / masks
    return None


def check_inside(where: str, box: Sequence[float], size: tuple[int, int]) -> None:
    """Raises UserError when a box reaches out of an image of ``size``, (width, height), or has no area.

    One pixel, or a hundredth of the image, over the edge is taken for rounding.
    """
    left, top, right, bottom = box
    slack = [max(_PIXELS, _SHARE * extent) for extent in size]
    inside = min(left + slack[0], top + slack[1]) >= 0 and right <= size[0] + slack[0] and bottom <= size[1] + slack[1]
    if not inside or not (left < right and top < bottom):
        shown = ", ".join(f"{value:g}" for value in box)
        raise UserError(
            f"{where}: the box from left, top to right, bottom ({shown}) must have an area and lie inside of the image "
            f"of {size[0]}x{size[1]} pixels: correct it"
        )
