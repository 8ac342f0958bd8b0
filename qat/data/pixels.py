"""Images by index, from arrays in memory, image files, or torchvision's data sets that read files.

If the decoded images of all files fit in 1 GiB, they are decoded once, at the start: then a corrupt image is found
before training. Otherwise files are decoded on demand.

Layouts: N images, C channels (RGB or grey), H height, W width. Pixels are uint8, 0..255.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qat.base.console import progress
from qat.base.errors import UserError, one_line
from qat.base.image_files import image_size, read_image, rgb

MEMORY_LIMIT = 1 << 30  # largest number of bytes of decoded images that are kept
_GREY_BATCH = 256  # images that are converted to grey at a time


class Pixels(Protocol):
    """Images by index: uint8 [C, H, W], where H and W may differ from one image to the next."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class ArrayPixels:
    """Images of one size, in memory: uint8 [N, C, H, W]."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def images_nchw(images: np.ndarray | Tensor) -> Tensor:
    """uint8 [N, H, W], [N, H, W, 3] or [N, 3, H, W] -> [N, 3, H, W], a view of the same memory."""
    tensor = torch.as_tensor(images)
    if tensor.ndim == 3:
        return tensor.unsqueeze(1).expand(-1, 3, -1, -1)
    return tensor.permute(0, 3, 1, 2) if tensor.shape[-1] == 3 else tensor


@dataclass(frozen=True)
class FilePixels:
    """Images in files; ``decoded`` holds them if they fit in memory."""

    paths: Sequence[str]
    decoded: Sequence[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return decode(self.paths[index]) if self.decoded is None else self.decoded[index]


@dataclass(frozen=True)
class TorchvisionPixels:
    """The images of a torchvision data set that reads its files on demand."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return _chw(rgb(self.dataset[index][0]))
        except Exception as error:  # Pillow raises many types of exceptions
            name = f"image {index} of torchvision's {type(self.dataset).__name__}"
            raise UserError(f"{name} is corrupt ({one_line(error)}): download the data set again") from error


@dataclass(frozen=True)
class GreyPixels:
    """RGB images as grey ones, uint8 [1, H, W]."""

    colored: Pixels

    def __len__(self) -> int:
        return len(self.colored)

    def __getitem__(self, index: int) -> Tensor:
        return grey(self.colored[index])


def in_grey(pixels: Pixels) -> Pixels:
    """RGB images as grey ones; those in memory are converted at once."""
    if not isinstance(pixels, ArrayPixels):
        return GreyPixels(pixels)
    images_NCHW = pixels.images
    if images_NCHW.stride(1) == 0:  # they were grey before images_nchw
        return ArrayPixels(images_NCHW[:, :1])
    return ArrayPixels(torch.cat([grey(part) for part in images_NCHW.split(_GREY_BATCH)]))


def grey(image: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> [..., 1, H, W], as Pillow converts to its mode L (ITU-R BT.601)."""
    red, green, blue = (image.narrow(-3, color, 1).int() for color in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).to(torch.uint8)


def decode(path: str) -> Tensor:
    """An image file as uint8 [3, H, W]. Raises UserError as ``read_image`` does."""
    return _chw(read_image(path))


def decode_all(paths: Sequence[str]) -> list[Tensor] | None:
    """All images, decoded in threads; None if they do not fit in memory."""
    size = 0
    for path in paths:
        width, height = image_size(path)
        size += 3 * width * height
        if size > MEMORY_LIMIT:
            return None
    decoded = []
    with progress("reading images", len(paths)) as task, ThreadPoolExecutor() as pool:
        for image in pool.map(decode, paths):
            decoded.append(image)
            task.advance()
    return decoded


def _chw(image_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(image_HWC).permute(2, 0, 1)
