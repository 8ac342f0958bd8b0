"""The loss that training minimizes: cross-entropy with the labels, and with distillation the distance to a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat.compute.device import Compute
from qat.graph.inner_outputs import with_inner_outputs
from qat.graph.network import Network
from qat.training.recipe import DistillationSettings


class CrossEntropy:
    """Cross-entropy with the labels."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def network(self, model: nn.Module) -> nn.Module:
        """The module that computes from ``model`` everything the loss needs; it shares the modules of ``model``."""
        return model

    def __call__(self, output: Any, targets: Tensor, x: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            output: the output of ``network(model)`` for ``x``.
            targets: labels int64 [N], or probabilities [N, classes].
            x: the normalized images [N, C, H, W].
        """
        return F.cross_entropy(output.float(), targets, label_smoothing=self.label_smoothing)


class Distillation(CrossEntropy):
    """Cross-entropy, distance to a teacher's outputs (Hinton et al. 2015) and to its tensors (Romero et al. 2015).

    loss = (1 - weight) * cross-entropy + weight * T^2 * KL(teacher / T || student / T)
           + feature_weight * mean over points of |student - teacher|^2 / |teacher|^2
    """

    def __init__(
        self,
        teacher: fx.GraphModule,
        compute: Compute,
        label_smoothing: float,
        settings: DistillationSettings,
        points: Sequence[str],
        images: int,
        steps: int,
    ) -> None:
        """``points``: names of tensors that both graphs have; ``images``: per batch; ``steps``: number of batches."""
        super().__init__(label_smoothing)
        self.weight, self.temperature = settings.weight, settings.temperature
        self.feature_weight = settings.feature_weight
        self.points = tuple(points) if settings.feature_weight else ()
        self.compute = compute
        self._teacher = compute.forward(self.network(teacher.eval().requires_grad_(False)), images, steps)

    def network(self, model: nn.Module) -> nn.Module:
        """Returns the logits and the tensors of ``points``."""
        assert isinstance(model, fx.GraphModule)
        return with_inner_outputs(model, self.points)

    def __call__(self, output: Any, targets: Tensor, x: Tensor) -> Tensor:
        """The loss of one batch; arguments as in ``CrossEntropy``."""
        logits, features = output
        with torch.no_grad(), self.compute.autocast():
            wanted, wanted_features = self._teacher(x)
        loss = (1 - self.weight) * super().__call__(logits, targets, x)
        ours, theirs = (F.log_softmax(values.float() / self.temperature, 1) for values in (logits, wanted))
        distance = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        loss = loss + self.weight * self.temperature**2 * distance
        for one, other in zip(features, wanted_features, strict=True):
            share = (one.float() - other.float()).square().sum() / other.float().square().sum()
            loss = loss + self.feature_weight / len(features) * share
        return loss


def stage_ends(network: Network) -> tuple[str, ...]:
    """The ends of a network's stages: the last tensor [N, C, H, W] of each resolution above 1x1."""
    ends: dict[tuple[int, ...], str] = {}
    for op in network:
        if op.floating and op.kind not in ("input", "output") and op.shape is not None and len(op.shape) == 4:
            ends[op.shape[2:]] = op.name
    return tuple(name for size, name in ends.items() if max(size) > 1)
