"""How many images a model gets right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.artifact import UserError
from qat.compute import Compute, exact_float32
from qat.console import progress
from qat.data import Data, ImageSet, batches
from qat.ranks import ALONE, Ranks


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

    Where several processes train, each computes its share, and all get the result.

    Raises UserError when the loss is not finite.
    """
    model.eval()

    def given() -> Iterator[tuple[Tensor, Tensor]]:
        for x_NCHW, labels in batches(images, batch_size, None, workers=workers, ranks=compute.ranks):
            yield data.preprocessing.normalize(compute.images(x_NCHW)), labels.to(compute.device)
            task.advance(len(labels) * compute.ranks.size)

    with exact_float32(), progress("evaluating", len(images)) as task:
        found = accuracy(model, given(), compute.ranks)
    if not math.isfinite(found.loss):
        raise UserError(
            f"the loss is {found.loss} in evaluation, a weight is NaN: start again with a lower learning rate"
        )
    return found


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], ranks: Ranks = ALONE) -> Accuracy:
    """Accuracy of ``model`` as it stands on normalized images [N, C, H, W] and labels int64 [N], on its device."""
    correct, loss, count = 0.0, 0.0, 0.0
    for x, labels in batches:
        logits = model(x)
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        count += len(labels)
    correct, loss, count = ranks.sums(correct, loss, count)
    return Accuracy(100 * correct / count, loss / count, int(count))
