"""Images by index, from arrays in memory, image files, or torchvision's data sets that read files.

If the decoded images of all files fit in 1 GiB, they are decoded once, at the start: then a corrupt image is found
before training. Otherwise files are decoded on demand.

Layouts: N images, C channels (RGB), H height, W width. Pixels are uint8, 0..255.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qat.base.console import progress
from qat.base.errors import UserError, one_line

MEMORY_LIMIT = 1 << 30  # largest number of bytes of decoded images that are kept


class Pixels(Protocol):
    """Images by index: uint8 [3, H, W], where H and W may differ from one image to the next."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class ArrayPixels:
    """Images of one size, in memory: uint8 [N, 3, H, W]."""

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
            return _rgb(self.dataset[index][0])
        except Exception as error:  # Pillow raises many types of exceptions
            name = f"image {index} of torchvision's {type(self.dataset).__name__}"
            raise UserError(f"{name} is corrupt ({one_line(error)}): download the data set again") from error


def decode_all(paths: Sequence[str]) -> list[Tensor] | None:
    """All images, decoded in threads; None if they do not fit in memory."""
    size = 0
    for path in paths:
        width, height = _image_size(path)
        size += 3 * width * height
        if size > MEMORY_LIMIT:
            return None
    decoded = []
    with progress("reading images", len(paths)) as task, ThreadPoolExecutor() as pool:
        for image in pool.map(decode, paths):
            decoded.append(image)
            task.advance()
    return decoded


def _image_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            width, height = image.size
            return width, height
    except Exception as error:  # Pillow raises many types of exceptions
        raise _unreadable(path, error) from error


def decode(path: str) -> Tensor:
    """An image file as uint8 [3, H, W]. Raises UserError naming the file when it is corrupt or truncated."""
    try:
        with Image.open(path) as image:
            return _rgb(image)
    except Exception as error:  # Pillow raises many types of exceptions
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"cannot read {path}: {error.strerror}; check the file and its permissions")
    reason = one_line(error).replace(f" {path!r}", "")
    return UserError(f"{path} is corrupt ({reason}): remove or replace it")


def _rgb(image: Image.Image) -> Tensor:
    """The image as uint8 [3, H, W]; transparency is dropped, and 16-bit grey loses its low byte."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
