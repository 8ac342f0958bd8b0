"""Mixup and CutMix: training images that are blends of two, with the labels blended too."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torchvision.transforms import v2

from qat.training.recipe import Recipe


def make_mixing(recipe: Recipe, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """MixUp or CutMix of a batch [N, C, H, W] and its labels [N], which become probabilities [N, classes]."""
    chosen = [
        transform(alpha=alpha, num_classes=classes)
        for transform, alpha in ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix))
        if alpha
    ]
    return v2.RandomChoice(chosen) if chosen else None
