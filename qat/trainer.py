"""The one training loop, for float and quantized models alike, resumable at any step.

Everything random is a function of (seed, phase, epoch, step): the order of the images, their augmentation, dropout. A
run that is stopped and resumed therefore ends with the same weights as one that was not (bitwise on a CPU). The best
epoch is chosen on the validation split; the test split is never seen here.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.artifact import UserError
from qat.console import progress, say
from qat.data import Data, ImageSet, batch_count, batches

_STEPS_BETWEEN_LOSS_CHECKS = 16  # reading the loss waits for the GPU


@dataclass(frozen=True)
class Recipe:
    """How one phase is trained. ``schedule`` of the learning rate: one-cycle warms up, cosine only falls."""

    epochs: int
    lr: float
    schedule: Literal["one-cycle", "cosine"]
    batch_size: int
    weight_decay: float
    label_smoothing: float
    seed: int

    def __post_init__(self) -> None:
        lowest = {"epochs": 0, "lr": 0, "batch_size": 2, "weight_decay": 0, "label_smoothing": 0}
        for name, least in lowest.items():
            if not getattr(self, name) >= least:  # NaN is not
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}: correct the option")
        if self.label_smoothing > 1:
            raise UserError(f"label_smoothing must be at most 1, got {self.label_smoothing}: correct the option")

    def lr_at(self, done: float) -> float:
        """The learning rate when the fraction ``done`` in [0, 1] of the phase is over."""
        warmup = 0.3 if self.schedule == "one-cycle" else 0.0
        if done < warmup:
            start = self.lr / 25
            return start + (self.lr - start) * (1 - math.cos(math.pi * done / warmup)) / 2
        return self.lr * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent and mean cross-entropy over ``images`` images."""

    top1: float
    loss: float
    images: int

    def __str__(self) -> str:
        return f"{self.top1:.2f} % of {self.images}"


@dataclass
class FitState:
    """Where a phase stands: the next step to do, what was seen, and the best weights so far (by validation)."""

    epoch: int = 0
    step: int = 0  # within the epoch
    loss_sum: float | Tensor = 0.0  # a tensor until somebody needs the number
    best_epoch: int = -1
    best_top1: float = -1.0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """All but the tensors, for JSON."""
        content = {name: value for name, value in vars(self).items() if name != "best_weights"}
        return content | {"best_loss": min(self.best_loss, 1e30)}  # JSON has no infinity


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised between two steps, after the state was saved."""


SaveState = Callable[[FitState, torch.optim.Optimizer], None]


def evaluate(
    model: nn.Module, images: ImageSet, data: Data, batch_size: int, device: torch.device, workers: int
) -> Accuracy:
    """Accuracy of ``model`` on all of ``images``, in evaluation mode. Raises UserError when the loss is not finite."""
    model.eval()
    correct, loss = 0, 0.0
    with torch.no_grad(), progress("evaluating", len(images)) as task:
        for x_NCHW, labels in batches(images, batch_size, None, workers=workers):
            logits = model(data.preprocessing.normalize(x_NCHW.to(device)))
            labels = labels.to(device)
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            task.advance(len(labels))
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} in evaluation, a weight is NaN: start again with a lower learning rate")
    return Accuracy(100 * correct / len(images), loss / len(images), len(images))


def fit(
    phase: str,
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    device: torch.device,
    workers: int,
    state: FitState,
    optimizer_state: Mapping[str, Tensor],
    save: SaveState,
    seconds_between_saves: float,
) -> FitState:
    """Trains ``model`` in place from ``state`` on, and leaves it with the weights of the best epoch.

    Args:
        phase: its name in progress lines and in the seeds.
        optimizer_state: from ``optimizer_tensors`` when resuming, else empty.
        save: called with the state every ``seconds_between_saves``, and before Interrupted is raised.

    Raises:
        UserError: the loss became NaN or infinite.
        Interrupted: Ctrl-C, after saving.
    """
    optimizer = _optimizer(model, recipe)
    _load_optimizer(optimizer, optimizer_state)
    total = batch_count(data.train, recipe.batch_size, training=True)
    last_save = time.monotonic()
    note = ""

    def save_now() -> None:
        nonlocal last_save
        # The loss was of the weights before the step; what is saved are those after it.
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise _diverged("a weight became NaN or infinite", state, recipe, total)
        save(state, optimizer)
        last_save = time.monotonic()

    with _deferred_interrupt() as interrupted:
        while state.epoch < recipe.epochs:
            model.train()
            description = f"{phase} epoch {state.epoch + 1}/{recipe.epochs}"
            with progress(description, total) as task:
                task.advance(state.step)
                steps = batches(
                    data.train,
                    recipe.batch_size,
                    recipe.seed,
                    state.epoch,
                    state.step,
                    workers,
                    training=True,
                )
                for x_NCHW, labels in steps:
                    done = (state.epoch + state.step / total) / recipe.epochs
                    torch.manual_seed(_step_seed(recipe.seed, phase, state.epoch, state.step))
                    loss = _step(model, optimizer, recipe, done, data, x_NCHW.to(device), labels.to(device))
                    state.step += 1
                    state.loss_sum = state.loss_sum + loss
                    stopping = interrupted()
                    due = stopping or time.monotonic() - last_save >= seconds_between_saves
                    if due or state.step % _STEPS_BETWEEN_LOSS_CHECKS == 0 or state.step == total:
                        state.loss_sum = float(state.loss_sum)
                        if not math.isfinite(state.loss_sum):
                            raise _diverged(f"the loss became {state.loss_sum}", state, recipe, total)
                        note = f"loss {state.loss_sum / state.step:.3f}"
                    task.advance(note=note)
                    if due and state.step < total:
                        save_now()
                    if stopping and state.step < total:
                        raise Interrupted
            _end_epoch(phase, model, data, recipe, device, workers, state, total)
            stopping = interrupted()
            if stopping or time.monotonic() - last_save >= seconds_between_saves:
                save_now()
            if stopping:
                raise Interrupted
    if state.best_weights:
        model.load_state_dict(state.best_weights)
    return state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: ``<parameter's position>.<entry>``."""
    entries = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in entries.items() for name, value in entry.items()
    }


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    done: float,
    data: Data,
    x_NCHW: Tensor,
    labels: Tensor,
) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_at(done)
    logits = model(data.preprocessing.normalize(x_NCHW))
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _end_epoch(
    phase: str,
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    device: torch.device,
    workers: int,
    state: FitState,
    total: int,
) -> None:
    """Validates, keeps the best weights, moves the state to the next epoch."""
    measured = evaluate(model, data.validation, data, recipe.batch_size, device, workers)
    train_loss = float(state.loss_sum) / max(total, 1)
    state.history.append({"train_loss": train_loss, "validation_top1": measured.top1, "validation_loss": measured.loss})
    # On a small validation split several epochs tie in accuracy; the loss decides among them.
    if (measured.top1, -measured.loss) > (state.best_top1, -state.best_loss):
        state.best_epoch, state.best_top1, state.best_loss = state.epoch, measured.top1, measured.loss
        state.best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    say(f"{phase} epoch {state.epoch + 1}/{recipe.epochs}: loss {train_loss:.4f}, validation {measured}")
    state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices and kernels only, not on biases and normalization."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr)


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    content = optimizer.state_dict()
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        content["state"].setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(content)


def _diverged(what: str, state: FitState, recipe: Recipe, total: int) -> UserError:
    rate = recipe.lr_at((state.epoch + state.step / total) / recipe.epochs)
    return UserError(
        f"{what} in epoch {state.epoch + 1}, at step {state.step} of {total} or shortly before, "
        f"where the learning rate was {rate:.2g}: start again with a lower one"
    )


def _step_seed(seed: int, phase: str, epoch: int, step: int) -> int:
    return (seed * 1_000_003 + sum(phase.encode()) * 7_919 + epoch * 104_729 + step) % 2**63


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C and SIGTERM back until the loop asks; a second Ctrl-C interrupts at once."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
