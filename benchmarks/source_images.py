"""What a network that resizes its images itself sees (export.onnx --source-size), against what it is trained on.

    PYTHONPATH=. python -m benchmarks.source_images

The images are the two photographs of scikit-learn, 427x640. Printed are differences in levels of 0..255: the mean, the
99th percentile of their sizes, the largest, and their mean with its sign. OpenCV is compared where it is installed.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from benchmarks.stamp import stamp
from deploy.fitting import fitted
from export.source_images import SourceImages
from qat.base.console import table
from qat.data.preprocessing import Interpolation, Preprocessing

ONES = ((0.0,) * 3, (1.0,) * 3)


def with_pillow(images_NCHW: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The letterbox of deploy/calibration_inputs.py."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, f"{index}.png")) for index in range(len(images_NCHW))]
        for one, file in zip(images_NCHW, files, strict=True):
            Image.fromarray(one.permute(1, 2, 0).numpy()).save(file)
        boxed = [fitted(file, asdict(preprocessing)) for file in files]
    return torch.from_numpy(np.stack(boxed)).permute(0, 3, 1, 2)


def with_opencv(images_NCHW: Tensor, preprocessing: Preprocessing) -> Tensor:
    """cv2.resize, bilinear, in a letterbox."""
    import cv2

    (height, width), (left, top, right, bottom) = preprocessing.places(*images_NCHW.shape[-2:])
    grey = (114, 114, 114)
    boxed = []
    for one in images_NCHW:
        resized = cv2.resize(one.permute(1, 2, 0).numpy(), (width, height), interpolation=cv2.INTER_LINEAR)
        boxed.append(cv2.copyMakeBorder(resized, top, bottom, left, right, cv2.BORDER_CONSTANT, value=grey))
    return torch.from_numpy(np.stack(boxed)).permute(0, 3, 1, 2)


def row(name: str, found: Tensor, expected: Tensor) -> tuple[str, ...]:
    """A line of the table."""
    gap = found - expected.float()
    size = gap.abs()
    figures = (size.mean(), size.flatten()[:: max(1, size.numel() // 10**6)].quantile(0.99), size.max(), gap.mean())
    return (name, *(f"{float(one):.2f}" for one in figures))


def main() -> None:
    """Prints the table."""
    images = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    height, width = images.shape[-2:]
    rows = []
    for size in (640, 320, 224):
        letterbox = Preprocessing(size, size, *ONES, resize=size, letterbox=True)
        found, name = SourceImages(height, width, letterbox).fit(images), f"letterbox of {size}"
        rows.append(row(f"{name}, torchvision", found, letterbox.fit(images)))
        rows.append(row(f"{name}, Pillow", found, with_pillow(images, letterbox)))
        if importlib.util.find_spec("cv2"):
            rows.append(row(f"{name}, OpenCV", found, with_opencv(images, letterbox)))
    ways: tuple[Interpolation, ...] = ("bilinear", "bicubic")
    for how in ways:
        for size, resize in ((416, 427), (224, 256), (144, 160)):
            crop = Preprocessing(size, size, *ONES, resize=resize, interpolation=how)
            found = SourceImages(height, width, crop).fit(images)
            name = f"crop of {size} out of {resize}, {how}, {height / resize:.1f} times"
            rows.append(row(name, found, crop.fit(images)))
    print(stamp("PYTHONPATH=. python -m benchmarks.source_images"))
    table("Levels of 0..255", ("against", "mean", "99 %", "largest", "signed mean"), rows)


if __name__ == "__main__":
    main()
