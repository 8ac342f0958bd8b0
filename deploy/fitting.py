"""An image file as the network is fed it, and boxes of the network's input back in the image. Needs no torch.

The one is resized and cropped, or put in a letterbox, as the sidecar says; the other undoes just that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qat.base.errors import UserError
from qat.base.letterbox import extents_within

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Fit:
    """How an image of ``image`` pixels, (width, height), becomes an input of ``size`` pixels.

    It is resized to ``resized``, and its left upper corner comes to ``corner`` of the input: at least 0 in a letterbox,
    at most 0 where the center is cropped.
    """

    image: tuple[int, int]
    size: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    letterbox: bool

    @classmethod
    def of(cls, image: tuple[int, int], preprocessing: Mapping[str, Any]) -> Fit:
        """For an image of (width, height) and a sidecar's ``preprocessing``."""
        size = (preprocessing["width"], preprocessing["height"])
        if preprocessing.get("letterbox", False):
            width, height = extents_within(image, size)
            return cls(image, size, (width, height), ((size[0] - width) // 2, (size[1] - height) // 2), True)
        short, (width, height) = min(image), image
        to_cover = max(wanted / extent for extent, wanted in zip(image, size, strict=True))
        if short != preprocessing["resize"] or to_cover > 1:
            width, height = (int(extent * preprocessing["resize"] / short) for extent in image)
            if width < size[0] or height < size[1]:
                width, height = (
                    max(round(extent * to_cover), wanted) for extent, wanted in zip(image, size, strict=True)
                )
        corner = (-round((width - size[0]) / 2), -round((height - size[1]) / 2))
        return cls(image, size, (width, height), corner, False)

    def back(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [n, 4] in pixels of the input -> in pixels of the image, cut at its edges."""
        factors = np.array([extent / resized for extent, resized in zip(self.image, self.resized, strict=True)] * 2)
        found: np.ndarray = (boxes.astype(np.float64) - np.array(self.corner * 2)) * factors
        return found.clip(0, np.array(self.image * 2))

    def mask(self, classes_HW: np.ndarray, outside: int) -> np.ndarray:
        """The class of each pixel of the image -> of the input, by the nearest pixel; ``outside`` around it."""
        from PIL import Image

        resized = Image.fromarray(classes_HW).resize(self.resized, Image.Resampling.NEAREST)
        whole = Image.new("L", self.size, outside)
        whole.paste(resized, self.corner)
        return np.asarray(whole)


def fitted(file: str, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """An image file as uint8 [height, width, C]: the short side resized to ``resize``, the center cropped.

    With ``letterbox`` the whole image is resized, and grey put around it. Where a crop would not cover the height and
    the width, it is resized until it does. ``preprocessing`` is a sidecar's. Up to a level or two what
    qat.data.preprocessing makes of it. Where the network does all this itself, the image stays as it is.

    Raises UserError when it cannot be read, or has not the size of the images that such a network takes.
    """
    from PIL import Image

    from qat.base.image_files import read_image

    image = Image.fromarray(read_image(file))
    if preprocessing["color"] == "grey":
        image = image.convert("L")
    if (source := preprocessing.get("source_size")) is not None:
        if [image.height, image.width] != list(source):
            raise UserError(
                f"{file} has {image.height}x{image.width} pixels (height x width), and the network takes images of "
                f"{source[0]}x{source[1]}, as its --source-size says: give such images"
            )
        return np.asarray(image).reshape(image.height, image.width, -1)
    fit = Fit.of(image.size, preprocessing)
    if fit.letterbox:
        return _in_letterbox(image, fit)
    if fit.resized != image.size:
        filtered_by = Image.Resampling[preprocessing["interpolation"].upper()]
        # First along the rows, as torchvision does. Of tall images Pillow would begin with the columns, and bicubic
        # overshoot is cut off after each of the two.
        image = image.resize((fit.resized[0], image.height), filtered_by).resize(fit.resized, filtered_by)
    left, top = -fit.corner[0], -fit.corner[1]
    cropped = image.crop((left, top, left + fit.size[0], top + fit.size[1]))
    return np.asarray(cropped).reshape(fit.size[1], fit.size[0], -1)


def _in_letterbox(image: Image.Image, fit: Fit) -> np.ndarray:
    """``image`` in grey, bilinear without antialiasing."""
    from PIL import Image

    from qat.base.image_files import LETTERBOX_GREY

    steps = (image.width / fit.resized[0], 0, 0, 0, image.height / fit.resized[1], 0)
    resized = image.transform(fit.resized, Image.Transform.AFFINE, steps, Image.Resampling.BILINEAR)
    whole = Image.new(image.mode, fit.size, (LETTERBOX_GREY,) * len(image.getbands()))
    whole.paste(resized, fit.corner)
    return np.asarray(whole).reshape(fit.size[1], fit.size[0], -1)
