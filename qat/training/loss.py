"""What training makes small: the loss of the labels; with distillation, the distance from a float teacher too."""

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
    """The loss of the labels alone."""

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def network(self, model: nn.Module) -> nn.Module:
        """What computes of ``model`` all that the loss needs; shares its modules."""
        return model

    def __call__(self, output: Any, targets: Tensor, x: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            output: what ``network`` made of ``x``.
            targets: labels int64 [N], or probabilities [N, classes].
            x: the normalized images [N, C, H, W].
        """
        return F.cross_entropy(output.float(), targets, label_smoothing=self.label_smoothing)


class Distillation(CrossEntropy):
    """The loss of the labels, of a teacher's answers (Hinton et al. 2015), and of its tensors (Romero et al. 2015).

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
        """``points``: tensors that both graphs have, by name; ``images``, ``steps``: of a batch, and how many."""
        super().__init__(label_smoothing)
        self.weight, self.temperature = settings.weight, settings.temperature
        self.feature_weight = settings.feature_weight
        self.points = tuple(points) if settings.feature_weight else ()
        self.compute = compute
        self._teacher = compute.forward(self.network(teacher.eval().requires_grad_(False)), images, steps)

    def network(self, model: nn.Module) -> nn.Module:
        """Gives the tensors of ``points`` beside the logits."""
        assert isinstance(model, fx.GraphModule)
        return with_inner_outputs(model, self.points)

    def __call__(self, output: Any, targets: Tensor, x: Tensor) -> Tensor:
        """As that of the labels."""
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
    """The last image-like tensor of each resolution: where a network's stages end."""
    ends: dict[tuple[int, ...], str] = {}
    for op in network:
        if op.floating and op.kind not in ("input", "output") and op.shape is not None and len(op.shape) == 4:
            ends[op.shape[2:]] = op.name
    return tuple(name for size, name in ends.items() if max(size) > 1)
