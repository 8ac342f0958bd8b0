"""Which images are asked for, in which splits and batches, as commands and library calls pass it on. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Images from ``source``, in splits that a seed determines. Values are checked when the images are loaded.

    Attributes:
        source: 'digits', an image folder, an .npz file, or 'torchvision:NAME'.
        image_size: height and width of the network's input in pixels; None: the size that suits the data.
        seed: determines which images go into which split.
        calibration_images: largest number of images in the calibration split.
        root: folder in which torchvision's data sets are found, or to which they are downloaded.
        channels: 3 for images in color, 1 for images in grey, to which colors are converted.
        mean: mean of each channel by which images are normalized, in 0..1; None: the mean with which the weights were
            trained.
        std: standard deviation by which images are normalized; None as for ``mean``.
        batch_size: images in a batch, for all processes together.
        workers: processes that decode images which do not fit in memory.
    """

    source: str
    image_size: int | None = None
    seed: int = 0
    calibration_images: int = 512
    root: Path = Path("data")
    channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    batch_size: int = 32
    workers: int = 0
