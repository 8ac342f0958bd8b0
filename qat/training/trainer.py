"""The training loop, for float and quantized models alike, which can be resumed at any step.

Everything random depends only on (seed, phase, epoch, step): the order of the images, their augmentation, dropout. So a
run that was stopped and resumed ends with the same weights as one that was not (bitwise on a CPU). The best epoch is
chosen on the validation split; the test split is not used here.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from qat.base.console import progress, say, warn
from qat.base.errors import UserError
from qat.compute.device import Compute
from qat.compute.processes import unwrap, without_averaging
from qat.data.batches import batch_count, batches
from qat.data.splits import Data
from qat.evaluate import evaluate
from qat.training.failures import first_not_finite, largest_fitting_batch
from qat.training.interrupts import Clock, Interrupted, deferred_interrupt
from qat.training.log import TrainingLog
from qat.training.loss import CrossEntropy
from qat.training.mixing import make_mixing
from qat.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors, update_average
from qat.training.progressive import quantize_part
from qat.training.recipe import Recipe

_Result = TypeVar("_Result")

_STEPS_BETWEEN_LOSS_CHECKS = 16  # reading the loss waits for the GPU


@dataclass
class FitState:
    """How far a phase has come: the next step, the figures so far, and the best weights so far (by validation)."""

    epoch: int = 0
    step: int = 0  # within the epoch
    loss_sum: float | Tensor = 0.0  # a tensor until the number is needed
    best_epoch: int = -1
    best_top1: float = -1.0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """Everything except the weights, for JSON."""
        content = {name: value for name, value in vars(self).items() if name != "best_weights"}
        return content | {"best_loss": min(self.best_loss, 1e30)}  # JSON has no infinity


class Fit:
    """One running phase: the model, which is trained in place, and all other state that is needed to resume it."""

    def __init__(
        self,
        phase: str,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        compute: Compute,
        workers: int = 0,
        log: TrainingLog | None = None,
        objective: CrossEntropy | None = None,
    ) -> None:
        """``phase``: its name in progress lines, in the log and in the seeds."""
        self.phase, self.model, self.data, self.recipe = phase, model, data, recipe
        self.compute, self.workers, self.log = compute, workers, log or TrainingLog(None)
        self.processes, self.state = compute.processes, FitState()
        self.total = batch_count(data.train, recipe.batch_size, training=True, processes=self.processes)
        self._optimizer = make_optimizer(model, recipe)
        self._scaler = compute.scaler()
        self._average = AveragedModel(model) if recipe.ema else None
        self.objective = objective or CrossEntropy(recipe.label_smoothing)
        self._forward = compute.forward(
            self.objective.network(model),
            self.processes.share_of(recipe.batch_size),
            steps=0 if recipe.progressive else recipe.epochs * self.total,  # each part would be compiled separately
            accumulates=recipe.accumulate > 1,
        )
        self._mix = make_mixing(recipe, len(data.class_names))
        self._unchecked: list[Tensor] = []  # batches whose loss was not checked yet

    @property
    def result(self) -> nn.Module:
        """The model that is evaluated: the moving average, if there is one."""
        return self.model if self._average is None else self._average.module

    @property
    def _models(self) -> list[nn.Module]:
        """The model that is trained, and the moving average, if there is one."""
        return [self.model] if self._average is None else [self.model, self._average.module]

    def resume(self, state: FitState, tensors: Mapping[str, Tensor]) -> None:
        """Continues from ``state`` and what ``tensors()`` returned for it; {} if the phase has just begun."""
        self.state = state
        parts = {name: _part(tensors, name) for name in ("optimizer", "average", "scaler")}
        load_optimizer(self._optimizer, parts["optimizer"])
        if self._average is not None and parts["average"]:
            self._average.load_state_dict(parts["average"])
        if parts["scaler"]:
            self._scaler.load_state_dict({name: value.item() for name, value in parts["scaler"].items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that must be saved in addition to the model and the state."""
        parts = {
            "optimizer": optimizer_tensors(self._optimizer),
            "average": {} if self._average is None else self._average.state_dict(),
            "scaler": {name: torch.tensor(value) for name, value in self._scaler.state_dict().items()},
        }
        return {f"{part}.{name}": value for part, entries in parts.items() for name, value in entries.items()}

    def run(self, save: Callable[[], None], seconds_between_saves: float) -> FitState:
        """Trains to the end and leaves the model with the weights of the best epoch.

        ``save`` is called every ``seconds_between_saves`` seconds, and on Ctrl-C before Interrupted is raised. Raises
        UserError when the loss becomes NaN or infinite.
        """
        clock = Clock(seconds_between_saves)
        self.log.begin(self.phase, self._steps_done())

        def save_or_stop() -> None:
            stopping, saving = self.processes.any(interrupted(), clock.due())
            if stopping or saving:
                self._check_loss()
                # The loss checked the weights before the step; the weights after it are saved.
                bad = [name for name, parameter in self.model.named_parameters() if not parameter.isfinite().all()]
                if bad:
                    raise self._divergence_error(f"{bad[0]} became NaN or infinite")
                save()
                clock.reset()
            if stopping:
                self.processes.wait()  # the main process writes, and torchrun ends it when another process ends
                raise Interrupted

        with deferred_interrupt() as interrupted:
            while self.state.epoch < self.recipe.epochs:
                for may_stop in self._epoch():
                    if may_stop:
                        save_or_stop()
                self._end_epoch()
                save_or_stop()
        self.compute.release()
        if self.state.best_weights:
            self.model.load_state_dict(self.state.best_weights)
        return self.state

    def _epoch(self) -> Iterator[bool]:
        """Trains on the remaining batches of the epoch; yields after each whether the run may be stopped there."""
        state, recipe = self.state, self.recipe
        self._set_mode()
        self._optimizer.zero_grad(set_to_none=True)
        with progress(f"{self.phase} epoch {state.epoch + 1}/{recipe.epochs}", self.total) as task:
            task.advance(state.step)
            steps = batches(
                self.data.train,
                recipe.batch_size,
                recipe.seed,
                state.epoch,
                state.step,
                self.workers,
                training=True,
                processes=self.processes,
            )
            note, logged, start = "", (state.step, float(state.loss_sum)), time.perf_counter()
            self._unchecked.clear()
            for x_NCHW, labels in steps:
                torch.manual_seed(_step_seed(recipe.seed, self.phase, state.epoch, state.step, self.processes.rank))
                ends_step = (state.step + 1) % recipe.accumulate == 0 or state.step + 1 == self.total
                loss = self._step_that_fits(x_NCHW, labels, ends_step)
                state.step += 1
                state.loss_sum = state.loss_sum + loss
                self._unchecked.append(x_NCHW)
                checked = state.step % _STEPS_BETWEEN_LOSS_CHECKS == 0 or state.step == self.total
                if checked:
                    loss_sum, seconds = self._check_loss(), time.perf_counter() - start
                    note, steps_taken = f"loss {loss_sum / state.step:.3f}", state.step - logged[0]
                    figures = {
                        "loss": (loss_sum - logged[1]) / steps_taken,
                        "learning_rate": self._optimizer.param_groups[0]["lr"],
                        "images_per_second": steps_taken * recipe.batch_size / seconds,
                    }
                    self.log.add(self.phase, self._steps_done(), figures)
                    logged, start = (state.step, loss_sum), time.perf_counter()
                task.advance(note=note)
                yield ends_step and state.step < self.total and (checked or self.processes.world_size == 1)

    def _step_that_fits(self, x_NCHW: Tensor, labels: Tensor, ends_step: bool) -> Tensor:
        """``_step``; raises UserError when the GPU has too little memory for it."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._beside_graphs(lambda: self._step(x_NCHW, labels, ends_step))
        self.compute.release()
        raise self._too_large(x_NCHW, labels)

    def _beside_graphs(self, work: Callable[[], _Result]) -> _Result:
        """The result of ``work``; if memory runs out, CUDA graphs are given up to free theirs, and it is run again."""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # Outside of the except clause, where the error no longer holds the memory.
        if not self.compute.give_up_graphs(self._forward):
            raise torch.OutOfMemoryError(reason)
        warn("the GPU does not have enough memory for CUDA graphs: training continues without them")
        self._optimizer.zero_grad(set_to_none=True)
        return work()

    def _step(self, x_NCHW: Tensor, labels: Tensor, ends_step: bool) -> Tensor:
        """Forward and backward pass of one batch, and the optimizer's step if it ``ends_step``; returns the loss."""
        recipe, optimizer = self.recipe, self._optimizer
        first = self.state.step - self.state.step % recipe.accumulate  # first batch of the optimizer's step
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * recipe.lr_at((self.state.epoch + first / self.total) / recipe.epochs)
        x = self.data.preprocessing.normalize(self.compute.images(x_NCHW))
        targets = labels.to(self.compute.device, non_blocking=True)
        if self._mix is not None:
            x, targets = self._mix(x, targets)
        share = (
            self.processes.world_size * len(x) / self._images_of_step(first)
        )  # the gradients are then averaged over processes
        with nullcontext() if ends_step else without_averaging(self._forward):
            with self.compute.autocast():
                output = self._forward(x)
            loss = self.objective(output, targets, x)
            if loss.device.type == "cpu" and self.processes.world_size == 1 and not loss.detach().isfinite():
                return loss.detach()  # without a step of the weights; on a GPU the scaler skips it, without waiting
            self._scaler.scale(loss * share).backward()
        if ends_step:
            if recipe.clip_norm:
                self._scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
            self._scaler.step(optimizer)
            self._scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if self._average is not None:
                update_average(self._average, self.model, recipe.ema)
        return loss.detach()

    def _images_of_step(self, first: int) -> int:
        """The number of images in the optimizer's step that begins with the batch ``first`` of an epoch."""
        size = self.recipe.batch_size
        in_epoch = min(len(self.data.train), self.total * size)
        return min(self.recipe.accumulate * size, in_epoch - first * size)

    def _set_mode(self) -> None:
        """Sets training mode, except for normalizations with frozen statistics, and turns quantizers on or off."""
        self.model.train()
        for model in self._models:
            quantize_part(model, self.recipe.quantized_share(self.state.epoch))
        after = self.recipe.freeze_norms_after
        if after is not None and self.state.epoch >= after:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _check_loss(self) -> float:
        """The sum of the epoch's losses so far, averaged over all processes; waits for the GPU.

        Raises UserError when it is not finite, or when too many steps were skipped because of gradients that were not.
        """
        self.state.loss_sum = self.processes.mean(float(self.state.loss_sum))
        if not math.isfinite(self.state.loss_sum):
            raise self._divergence_error(f"the loss became {self.state.loss_sum}")
        if self._scaler.is_enabled() and self._scaler.get_scale() < self.compute.least_scale:
            raise self._divergence_error("gradients became NaN or infinite")
        self._unchecked.clear()
        return self.state.loss_sum

    def _steps_done(self) -> int:
        """Number of batches since the start of the phase."""
        return self.state.epoch * self.total + self.state.step

    def _end_epoch(self) -> None:
        """Evaluates on the validation split, keeps the best weights, and moves the state to the next epoch."""
        state, recipe = self.state, self.recipe
        for model in self._models:
            self.processes.take_buffers_of_first(model)
        given = (self.result, self.data.validation, recipe.batch_size, self.compute, self.workers)
        measured = self._beside_graphs(lambda: evaluate(*given))
        train_loss = float(state.loss_sum) / max(self.total, 1)
        scores = {"train_loss": train_loss, "validation_top1": measured.top1, "validation_loss": measured.loss}
        state.history.append(scores | {"learning_rate": self._optimizer.param_groups[0]["lr"]})
        self.log.add(self.phase, self._steps_done(), scores)
        # On a small validation split several epochs may tie in accuracy; then the loss decides.
        better = (measured.top1, -measured.loss) > (state.best_top1, -state.best_loss)
        if better and recipe.quantized_share(state.epoch) == 1:
            state.best_epoch, state.best_top1, state.best_loss = state.epoch, measured.top1, measured.loss
            state.best_weights = {name: value.detach().clone() for name, value in self.result.state_dict().items()}
        say(f"{self.phase} epoch {state.epoch + 1}/{recipe.epochs}: loss {train_loss:.4f}, validation {measured}")
        state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0

    def _divergence_error(self, what: str) -> UserError:
        """The error for a loss, gradient or weight that is not finite; names the first layer whose output is not."""
        state, recipe = self.state, self.recipe
        normalize, images = self.data.preprocessing.normalize, self.compute.images
        with self.compute.autocast():
            place = first_not_finite(self.model, (normalize(images(x_NCHW)) for x_NCHW in self._unchecked))
        first = f", first in {place}" if place else ""
        rate = recipe.lr_at((state.epoch + state.step / self.total) / recipe.epochs)
        return UserError(
            f"{what} in epoch {state.epoch + 1}, at step {state.step} of {self.total} or shortly before"
            f"{first}; the learning rate was {rate:.2g}: start again with a lower one"
        )

    def _too_large(self, x_NCHW: Tensor, labels: Tensor) -> UserError:
        """The error for a batch that does not fit into the GPU's memory; names a batch size that would."""

        def step(images: int) -> None:
            self._optimizer.zero_grad(set_to_none=True)
            self._step(x_NCHW[:images], labels[:images], ends_step=False)

        self._forward = unwrap(self._forward)  # no more messages to other processes
        recipe, parameters, world_size = self.recipe, self.model.parameters(), self.processes.world_size
        moments = [] if self._optimizer.state else [torch.empty_like(p) for p in parameters for _ in range(2)]
        fits = world_size * largest_fitting_batch(step, len(x_NCHW))
        del moments  # they took the memory that the optimizer's first step will take
        found = f"the GPU does not have enough free memory for batches of {world_size * len(x_NCHW)} images"
        if not fits:
            return UserError(f"{found}, nor for {2 * world_size}: free some, or give a smaller --image-size")
        times = -(-recipe.batch_size * recipe.accumulate // fits)
        made = f"which makes training steps of {fits * times} images"
        return UserError(f"{found}; {fits} fit: give --batch-size {fits} --accumulate {times}, {made}")


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The entries of one part, by their names without that of the part."""
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def _step_seed(seed: int, phase: str, epoch: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + sum(phase.encode()) * 7_919 + epoch * 104_729 + step + rank * 15_485_863) % 2**63
