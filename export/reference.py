"""Test images and PyTorch's answers in a file beside the ONNX file: ``model.onnx`` -> ``model.reference.npz``.

With it an engine can be checked on a machine that has neither torch nor the data set; deploy/reference.py reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.base.artifact import atomic_write, sha256_of
from qat.base.console import warn
from qat.base.errors import UserError
from qat.checkpoint import Checkpoint, training_data
from qat.data.batches import batches
from qat.data.parts import NO_LABEL
from qat.data.splits import Data

_BATCH = 32
_RANDOM_IMAGES = 8


@dataclass(frozen=True)
class Sample:
    """Images before normalization, uint8 [N, 3, H, W]; labels, int64 [N], -1 where there are none; their origin."""

    images_NCHW: Tensor
    labels: Tensor
    source: str


def sample(checkpoint: Checkpoint, count: int) -> Sample:
    """Up to ``count`` images of the test split that the checkpoint was measured on, or random ones without it.

    Of images without labels too few to hold any out, those that it was calibrated on.
    """
    try:
        loaded = training_data(checkpoint)
    except UserError as error:
        warn(f"the test images are not at hand ({error}); comparing on random ones, which says less")
        generator = torch.Generator().manual_seed(0)
        shape = (min(count, _RANDOM_IMAGES), 3, checkpoint.preprocessing.height, checkpoint.preprocessing.width)
        x_NCHW = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return Sample(x_NCHW, torch.full((len(x_NCHW),), NO_LABEL), "random images")
    return first_images(loaded, count)


def first_images(data: Data, count: int) -> Sample:
    """Up to ``count`` images of the test split of ``data``, or of its calibration split where that is all there is."""
    split = "test" if len(data.test) else "calibration"
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for x_NCHW, y in batches(getattr(data, split), _BATCH, None):
        left = count - sum(map(len, labels))
        images.append(x_NCHW[:left])
        labels.append(y[:left])
        if left <= len(y):
            break
    return Sample(torch.cat(images), torch.cat(labels), f"the {split} split of {data.source}")


def reference_path(onnx: Path) -> Path:
    """``model.onnx`` -> ``model.reference.npz``."""
    return onnx.with_name(onnx.name.removesuffix(".onnx") + ".reference.npz")


def write_reference(path: Path, images: Sample, logits: Tensor) -> dict[str, Any]:
    """Writes ``images`` with the answers that an engine is held against, float32 [N, classes]: PyTorch's, say.

    Returns what the ONNX file's sidecar records of it. Raises UserError when the disk does not take it.
    """
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:  # given a path, NumPy would append .npz to it
            np.savez_compressed(
                file,
                images=images.images_NCHW.permute(0, 2, 3, 1).contiguous().numpy(),
                labels=images.labels.numpy(),
                logits=logits.numpy(),
            )
        digest = sha256_of(temporary)
    labelled = bool((images.labels != NO_LABEL).all())
    return {
        "file": path.name,
        "sha256": digest,
        "images": len(images.labels),
        "source": images.source,
        "top1": 100 * float((logits.argmax(1) == images.labels).double().mean()) if labelled else None,
    }
