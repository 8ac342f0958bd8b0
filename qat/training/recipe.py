"""The settings of one phase of training: epochs, learning rate, regularization; and those of distillation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qat.base.choices import Schedule
from qat.base.errors import UserError
from qat.graph.network import Network
from qat.rules.attention_rules import attentions
from qat.training.schedule import learning_rate

_LEAST = {
    "epochs": 0,
    "lr": 0,
    "batch_size": 2,
    "weight_decay": 0,
    "label_smoothing": 0,
    "accumulate": 1,
} | dict.fromkeys(("clip_norm", "mixup", "cutmix", "ema", "ranges_lr", "progressive"), 0)
_MOST = {"label_smoothing": 1.0, "ema": 0.999999}


@dataclass(frozen=True)
class Recipe:
    """The settings of one phase. Raises UserError when a value is out of range."""

    epochs: int
    lr: float
    schedule: Schedule
    """one-cycle warms up first, cosine only falls."""
    batch_size: int
    weight_decay: float
    label_smoothing: float
    seed: int
    attention_lr: float | None = None
    """Learning rate of a network with attention, instead of ``lr``; None: the same."""
    accumulate: int = 1
    """Number of batches whose gradients are accumulated for one step of the optimizer."""
    clip_norm: float = 0.0
    """Largest norm of all gradients together; 0: no limit."""
    mixup: float = 0.0
    """Blends pairs of images, with weights from Beta(mixup, mixup) (Zhang et al. 2018); 0 turns it off."""
    cutmix: float = 0.0
    """Pastes a box of one image into another, its area from Beta(cutmix, cutmix) (Yun et al. 2019); 0 turns it off."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then evaluated and kept; 0 turns it off."""
    ranges_lr: float = 1.0
    """Learning rate of learned ranges, as a multiple of the learning rate of the weights."""
    freeze_norms_after: int | None = None
    """Number of epochs after which the statistics of batch normalization are frozen; None: never."""
    progressive: int = 0
    """Number of epochs at the start in which only part of the network, growing from the input on, is quantized."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:  # NaN is not
                raise UserError(f"{name} must be at least {least}, but is {getattr(self, name)}: correct the option")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise UserError(f"{name} must be at most {most}, but is {getattr(self, name)}: correct the option")
        if self.progressive >= max(self.epochs, 1):
            raise UserError(
                f"progressive must be below the {self.epochs} epochs of the fine-tuning, but is {self.progressive}: "
                "lower it, because the last epochs train with the whole network quantized"
            )

    def suited_to(self, network: Network) -> Recipe:
        """The same with the learning rate for ``network``."""
        if self.attention_lr is None or not attentions(network):
            return self
        return replace(self, lr=self.attention_lr)

    def quantized_share(self, epoch: int) -> float:
        """The share of the network that is quantized in ``epoch``, counted from 0."""
        return min((epoch + 1) / (self.progressive + 1), 1.0)

    def lr_at(self, done: float) -> float:
        """The learning rate after the fraction ``done`` in [0, 1] of the phase."""
        return learning_rate(self.schedule, self.lr, done)


@dataclass(frozen=True)
class DistillationSettings:
    """How the fine-tuning follows the float network (qat/training/loss.py). Raises UserError when out of range.

    Attributes:
        weight: weight, from 0 to 1, of the distance to the float network's outputs; the labels have the rest.
        temperature: by which the logits of both networks are divided for that distance.
        feature_weight: weight of the distance to the float network's tensors at the ends of its stages.
    """

    weight: float = 0.0
    temperature: float = 4.0
    feature_weight: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.weight <= 1 and self.temperature > 0 and self.feature_weight >= 0):
            raise UserError(
                f"--distill {self.weight} must be from 0 to 1, --distill-temperature {self.temperature} above 0, and "
                f"--distill-features {self.feature_weight} at least 0: correct the option that is out of range"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss needs the float network."""
        return self.weight > 0 or self.feature_weight > 0
