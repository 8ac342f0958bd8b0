"""Test images and PyTorch's answers in a file beside the ONNX file: ``model.onnx`` -> ``model.reference.npz``.

With it an engine can be checked on a machine that has neither torch nor the data set; deploy/reference.py reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.base.artifact import sha256_of
from qat.base.console import warn
from qat.base.errors import UserError
from qat.base.trust import NotTrustedError, untrusted_mode
from qat.base.writing import atomic_write
from qat.checkpoint import Checkpoint, training_data
from qat.data.batches import first_batches
from qat.data.parts import NO_LABEL
from qat.data.splits import Data

_BATCH = 32
_RANDOM_IMAGES = 8
_MOST_BYTES = 32 * 2**20  # of large outputs


@dataclass(frozen=True)
class Sample:
    """Images before normalization, uint8 [N, 3, H, W]; labels, int64 [N], -1 if there are none; where they are from.

    ``others``: the further inputs of a network with several, float32 [N, ...].
    """

    images_NCHW: Tensor
    labels: Tensor
    source: str
    others: tuple[Tensor, ...] = ()


def sample(checkpoint: Checkpoint, count: int) -> Sample:
    """Up to ``count`` images of the test split that the checkpoint was measured on.

    If there is no test split, because there were few images and no labels, they are images that it was calibrated on.
    If the data set is not at hand, they are random. Raises NotTrustedError when it may not be read (docs/trust.md); in
    the mode for untrusted files they are random then, too.
    """
    try:
        loaded = training_data(checkpoint)
    except UserError as error:
        if isinstance(error, NotTrustedError) and not untrusted_mode():
            raise
        warn(f"the test images are not at hand ({error}); comparing on random ones, which says less")
        return random_images(checkpoint.preprocessing.input_shape, count)
    return first_images(loaded, count)


def random_images(input_shape: tuple[int, int, int], count: int) -> Sample:
    """Up to 8 images [C, H, W] of random bytes, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (min(count, _RANDOM_IMAGES), *input_shape)
    x_NCHW = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Sample(x_NCHW, torch.full((len(x_NCHW),), NO_LABEL), "random images")


def first_images(data: Data, count: int) -> Sample:
    """Up to ``count`` images of the test split of ``data``, or of its calibration split if the test split is empty."""
    split = "test" if len(data.test) else "calibration"
    images, labels = zip(*first_batches(getattr(data, split), count, _BATCH), strict=True)
    return Sample(torch.cat(images), torch.cat(labels), f"the {split} split of {data.source}")


def write_reference(path: Path, images: Sample, answers: Sequence[Tensor], *, logits: bool) -> dict[str, Any]:
    """Writes ``images`` and the ``answers`` that an engine is compared with: each output, [N, ...].

    ``logits``: whether there is one, known to be logits [N, classes], so that labels say which are right. Of large
    outputs, such as those of detectors, the first few images are kept.

    Returns what the ONNX file's sidecar records of the file. Raises UserError when it cannot be written.
    """
    size = sum(answer[0].nbytes for answer in answers)
    plain = len(answers) == 1 and answers[0].ndim == 2
    count = len(images.labels) if plain else min(len(images.labels), max(1, _MOST_BYTES // size))
    outputs: dict[str, Any] = {
        "logits" if plain else f"output_{index}": answer[:count].numpy() for index, answer in enumerate(answers)
    }
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:  # given a path, NumPy would append .npz to it
            np.savez_compressed(
                file,
                images=images.images_NCHW[:count].permute(0, 2, 3, 1).contiguous().numpy(),
                labels=images.labels[:count].numpy(),
                **outputs,
            )
        digest = sha256_of(temporary)
    labelled = logits and bool((images.labels != NO_LABEL).all())
    return {
        "file": path.name,
        "sha256": digest,
        "images": count,
        "source": images.source,
        "top1": 100 * float((answers[0].argmax(1) == images.labels).double().mean()) if labelled else None,
    }
