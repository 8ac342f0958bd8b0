"""How one phase is trained: epochs, learning rate, regularization."""

from __future__ import annotations

from dataclasses import dataclass

from qat.base.choices import Schedule
from qat.base.errors import UserError
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
    """One phase. Raises UserError where a value is out of range."""

    epochs: int
    lr: float
    schedule: Schedule
    """one-cycle warms up, cosine only falls."""
    batch_size: int
    weight_decay: float
    label_smoothing: float
    seed: int
    accumulate: int = 1
    """Batches whose gradients make one step of the optimizer."""
    clip_norm: float = 0.0
    """Largest norm of all gradients together; 0: no limit."""
    mixup: float = 0.0
    """Zhang et al. 2018: pairs of images are blended, with weights from Beta(mixup, mixup); 0: not."""
    cutmix: float = 0.0
    """Yun et al. 2019: a box of one image is put into another, its area from Beta(cutmix, cutmix); 0: not."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is what is evaluated and kept; 0: none."""
    ranges_lr: float = 1.0
    """How many times the learning rate of the weights that of learned ranges is."""
    freeze_norms_after: int | None = None
    """Epochs after which the statistics of batch normalization no longer follow the batches; None: never."""
    progressive: int = 0
    """Epochs at the start in which a part of the network is quantized, from the input on, more of it in each."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:  # NaN is not
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}: correct the option")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise UserError(f"{name} must be at most {most}, got {getattr(self, name)}: correct the option")
        if self.progressive >= max(self.epochs, 1):
            raise UserError(
                f"progressive must be below the {self.epochs} epochs of the fine-tuning, got {self.progressive}: "
                "in the last ones all is quantized"
            )

    def quantized_share(self, epoch: int) -> float:
        """How much of the network is quantized in an epoch, counted from 0."""
        return min((epoch + 1) / (self.progressive + 1), 1.0)

    def lr_at(self, done: float) -> float:
        """The learning rate when the fraction ``done`` in [0, 1] of the phase is over."""
        return learning_rate(self.schedule, self.lr, done)


@dataclass(frozen=True)
class DistillationSettings:
    """How the fine-tuning follows the float network (qat/training/loss.py). Raises UserError where out of range.

    Attributes:
        weight: share of the loss that is the distance from the float network's answers, 0 to 1.
        temperature: by which both networks' logits are divided for that distance.
        feature_weight: weight of the distance from the float network's tensors where its stages end.
    """

    weight: float = 0.0
    temperature: float = 4.0
    feature_weight: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.weight <= 1 and self.temperature > 0 and self.feature_weight >= 0):
            raise UserError(
                "--distill must be between 0 and 1, --distill-temperature above 0, --distill-features at least 0"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether there is anything to follow."""
        return self.weight > 0 or self.feature_weight > 0
