"""Images as a camera gives them, of one size, resized and cropped or put in a letterbox within the network.

It is what qat.data.preprocessing does, by operators that every TensorRT has, with two differences: values are not
rounded to levels behind the resize, and nothing is antialiased, because TensorRT's Resize has no such option. Of a
letterbox the first is all that differs; a crop is antialiased in training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from export.reference import Sample
from qat.base.errors import UserError
from qat.base.image_files import LETTERBOX_GREY
from qat.data.preprocessing import Preprocessing

MOST = 8
"""Images that a file with such an input is compared on, at most: of a camera they are large."""


@dataclass(frozen=True)
class SourceImages:
    """Images of ``height`` x ``width``, and what makes them those of the network.

    Raises UserError when they have the size of the network's input already, which needs no resizing.
    """

    height: int
    width: int
    preprocessing: Preprocessing

    @classmethod
    def of(cls, size: tuple[int, int] | None, preprocessing: Preprocessing | None) -> SourceImages | None:
        """Images of ``size``, (height, width), for a network that is fed so; None without a size.

        Raises UserError when the preprocessing is not known.
        """
        if size is None:
            return None
        if preprocessing is None:
            raise UserError(
                "--source-size resizes images as preprocessing says, and the network has none: give preprocessing"
            )
        return cls(*size, preprocessing)

    def __post_init__(self) -> None:
        if (self.height, self.width) == (self.preprocessing.height, self.preprocessing.width):
            raise UserError(
                f"--source-size {self.height}x{self.width} is the size of the network's input, which needs no "
                "resizing: leave it out"
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of such an image."""
        return self.preprocessing.channels, self.height, self.width

    def arguments(self) -> tuple[list[int], list[int], str, int]:
        """What ``placed`` is told of these images."""
        size, around = self.preprocessing.places(self.height, self.width)
        fill = LETTERBOX_GREY if self.preprocessing.letterbox else 0
        return size, around, self.preprocessing.interpolation, fill

    def fit(self, images_NCHW: Tensor) -> Tensor:
        """[N, C, height, width] in 0..255 -> float32 of the network's height and width, as the file computes it."""
        return placed(images_NCHW.float(), *self.arguments())

    def enlarged(self, sample: Sample) -> Sample:
        """The first images of ``sample``, which have the network's size, in this size, as if a camera had made them."""
        size = [self.height, self.width]
        images = transforms.resize(sample.images_NCHW[:MOST], size, antialias=True)
        return Sample(images, sample.labels[:MOST], f"{sample.source}, resized to {self.height}x{self.width}")


def placed(x_NCHW: Tensor, size: Sequence[int], around: Sequence[int], interpolation: str, fill: int) -> Tensor:
    """Floats [N, C, H, W] resized to ``size``, with ``around`` (left, top, right, bottom) added, or cut off below 0.

    ``interpolation``: bilinear or bicubic, without antialiasing. ``fill``: the value of what is added.
    """
    if list(x_NCHW.shape[-2:]) != list(size):
        x_NCHW = F.interpolate(x_NCHW, list(size), mode=interpolation, align_corners=False)
        if interpolation == "bicubic":  # it overshoots
            x_NCHW = x_NCHW.clamp(0, 255)
    left, top, right, bottom = (max(0, -side) for side in around)
    x_NCHW = x_NCHW[..., top : x_NCHW.shape[-2] - bottom, left : x_NCHW.shape[-1] - right]
    left, top, right, bottom = (max(0, side) for side in around)
    if left or top or right or bottom:
        x_NCHW = F.pad(x_NCHW, (left, right, top, bottom), value=float(fill))
    return x_NCHW


def size_of(text: str) -> tuple[int, int]:
    """``1080x1920`` -> (1080, 1920). Raises UserError for anything else, and for sizes below 1."""
    found = re.fullmatch(r"(-?\d+)x(-?\d+)", text)
    if not found or min(height_width := (int(found[1]), int(found[2]))) < 1:
        raise UserError(f"--source-size {text}: must be height x width in pixels, each at least 1, as in 1080x1920")
    return height_width
