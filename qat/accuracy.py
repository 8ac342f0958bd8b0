"""How many images a model gets right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from qat.artifact import UserError
from qat.compute import Compute, exact_float32
from qat.console import progress
from qat.data import Data, ImageSet, batches


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent and mean cross-entropy over ``images`` images."""

    top1: float
    loss: float
    images: int

    def __str__(self) -> str:
        return f"{self.top1:.2f} % of {self.images}"


def evaluate(
    model: nn.Module, images: ImageSet, data: Data, batch_size: int, compute: Compute, workers: int = 0
) -> Accuracy:
    """Accuracy of ``model`` on all of ``images``, in evaluation mode and exact float32.

    Raises UserError when the loss is not finite.
    """
    model.eval()
    correct, loss = 0, 0.0
    with torch.no_grad(), exact_float32(), progress("evaluating", len(images)) as task:
        for x_NCHW, labels in batches(images, batch_size, None, workers=workers):
            logits = model(data.preprocessing.normalize(compute.images(x_NCHW)))
            labels = labels.to(compute.device)
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            task.advance(len(labels))
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} in evaluation, a weight is NaN: start again with a lower learning rate")
    return Accuracy(100 * correct / len(images), loss / len(images), len(images))
