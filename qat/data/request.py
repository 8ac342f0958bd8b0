"""Which images are asked for, and how they are dealt: what commands and library calls pass on. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ThreeFloats = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Images from ``source`` in splits that a seed decides; values are checked when they are loaded.

    Attributes:
        source: 'digits', an image folder, an .npz file, or 'torchvision:NAME'.
        image_size: height and width of the network's input in pixels; None for what suits the data.
        seed: decides which images go into which split.
        calibration_images: upper limit on the calibration split.
        root: where torchvision's data sets are, or are downloaded to.
        mean: by which images are normalized, for red, green and blue in 0..1; None for what the weights were trained
        with. std: the deviation, likewise. batch_size: images in a batch, of all processes together. workers: processes
        that decode images which do not fit in memory.
    """

    source: str
    image_size: int | None = None
    seed: int = 0
    calibration_images: int = 512
    root: Path = Path("data")
    mean: ThreeFloats | None = None
    std: ThreeFloats | None = None
    batch_size: int = 32
    workers: int = 0
