"""How many images a model classifies correctly, and how well two models agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.base.console import progress, say, table
from qat.base.errors import UserError
from qat.base.number_format import INT8
from qat.base.output_agreement import OutputAgreement, OutputSums
from qat.base.sqnr import sqnr_db
from qat.base.text import decibels
from qat.compute.device import Compute
from qat.compute.precision import exact_float32
from qat.compute.processes import SINGLE_PROCESS, Processes
from qat.data.batches import ImageSet, batches
from qat.data.splits import Data
from qat.graph.outputs import leaves


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent and mean cross-entropy over ``images`` images."""

    top1: float
    loss: float
    images: int

    def __str__(self) -> str:
        return f"{self.top1:.2f} % of {self.images}"

    def test_figures(self) -> dict[str, float]:
        """The entries of a checkpoint's figures for an accuracy that was measured on the test split."""
        return {"test_top1": self.top1, "test_loss": self.loss, "test_images": self.images}


@dataclass(frozen=True)
class Agreement:
    """How close a quantized model's outputs are to the float model's on ``images`` images; needs no labels.

    ``top1``: share of images for which both predict the same class, in percent; None of a network that answers no
    classes, which has ``outputs``. ``sqnr_db``: SQNR of the logits, or of the output that is farthest, in dB; None if
    all are equal.
    """

    top1: float | None
    sqnr_db: float | None
    images: int
    outputs: tuple[OutputAgreement, ...] = ()


def inputs(images: ImageSet, batch_size: int, compute: Compute, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """``images`` in order, or this process's share: normalized [N, C, H, W] and labels int64 [N], on the device."""
    for x_NCHW, labels in batches(images, batch_size, None, workers=workers, processes=compute.processes):
        yield images.preprocessing.normalize(compute.images(x_NCHW)), labels.to(compute.device, non_blocking=True)


def evaluate(model: nn.Module, images: ImageSet, batch_size: int, compute: Compute, workers: int = 0) -> Accuracy:
    """Accuracy of ``model`` on all of ``images``, in evaluation mode and exact float32.

    With several processes, each computes its share, and all get the same result.

    Raises UserError when the loss is not finite.
    """
    model.eval()

    def given() -> Iterator[tuple[Tensor, Tensor]]:
        for x, labels in inputs(images, batch_size, compute, workers):
            yield x, labels
            task.advance(len(labels) * compute.processes.world_size)

    with exact_float32(), progress("evaluating", len(images)) as task:
        found = accuracy(model, given(), compute.processes)
    if not math.isfinite(found.loss):
        raise UserError(
            f"the loss in evaluation is {found.loss}: a weight is NaN; start again with a lower learning rate"
        )
    return found


@torch.no_grad()
def accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], processes: Processes = SINGLE_PROCESS
) -> Accuracy:
    """Accuracy of ``model``, in its present mode, on normalized images [N, C, H, W] and labels int64 [N]."""
    counts = _Counts()
    for x, labels in batches:
        counts.add(model(x), labels)
    return counts.accuracy(processes)


@torch.no_grad()
def compare(
    exact: nn.Module,
    quantized: nn.Module,
    data: Data,
    images: ImageSet,
    batch_size: int,
    compute: Compute,
    workers: int,
) -> tuple[Agreement, tuple[Accuracy, ...]]:
    """How well ``quantized`` agrees with ``exact`` on all of ``images``; with labels, the accuracy of both as well.

    Both answer logits. Computed in evaluation mode and exact float32, by one process. Raises UserError when an output
    is not finite.
    """
    models = (exact.eval(), quantized.eval())
    counts = tuple(_Counts() for _ in models if data.labelled)
    same, power, noise = 0, 0.0, 0.0
    with exact_float32(), progress("comparing", len(images)) as task:
        for x, labels in inputs(images, batch_size, compute, workers):
            answers = [model(x) for model in models]
            for count, logits in zip(counts, answers, strict=False):
                count.add(logits, labels)
            before, after = (logits.double() for logits in answers)
            same += int((before.argmax(1) == after.argmax(1)).sum())
            power += float(before.square().sum())
            noise += float((after - before).square().sum())
            task.advance(len(labels))
    if not math.isfinite(power + noise):
        raise UserError("the network's output has NaN or infinity: a weight is NaN; give other weights")
    agreement = Agreement(100 * same / len(images), sqnr_db(power, noise), len(images))
    return agreement, tuple(count.accuracy() for count in counts)


@torch.no_grad()
def compare_outputs(
    exact: nn.Module, quantized: nn.Module, images: ImageSet, batch_size: int, compute: Compute, workers: int
) -> Agreement:
    """How well two networks with any outputs agree on all of ``images``.

    Computed in evaluation mode and exact float32, by one process. Raises UserError when an output is not finite.
    """
    models = (exact.eval(), quantized.eval())
    sums: dict[str, OutputSums] = {}
    with exact_float32(), progress("comparing", len(images)) as task:
        for x, labels in inputs(images, batch_size, compute, workers):
            before, after = (dict(leaves(model(x))) for model in models)
            for name, tensor in before.items():
                if isinstance(tensor, Tensor):
                    _check_finite(name, tensor, after[name])
                    sums.setdefault(name, OutputSums(name)).add(tensor.cpu().numpy(), after[name].cpu().numpy())
            task.advance(len(labels))
    outputs = tuple(one.agreement() for one in sums.values())
    ratios = [output.sqnr_db for output in outputs if output.sqnr_db is not None]
    return Agreement(None, min(ratios, default=None), len(images), outputs)


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise UserError(f"the network's output {name} has NaN or infinity: a weight is NaN; give other weights")


def say_figures(figures: Mapping[str, Any]) -> None:
    """Prints what a checkpoint records about a network that was calibrated without training."""
    if not figures:
        say("nothing was measured: there are too few images to hold any out")
        return
    agreement = figures["agreement"]
    if agreement["top1"] is None:
        rows = [
            (one["tensor"] or "output", str(agreement["images"]), OutputAgreement(**one).measured)
            for one in agreement["outputs"]
        ]
        table(f"{INT8.name} against float, on images that were held out", ("output", "images", "SQNR"), rows)
        return
    columns, agrees = (
        ("same class as float", "SQNR of the logits"),
        (f"{agreement['top1']:.2f} %", decibels(agreement["sqnr_db"])),
    )
    if "ptq" not in figures:
        title = f"Agreement on {agreement['images']} held-out images without labels"
        table(title, ("network", *columns), [("INT8, post-training", *agrees)])
        return
    floats, codes = (
        (f"{figures[key]['test_top1']:.2f} %", f"{figures[key]['test_loss']:.4f}") for key in ("float", "ptq")
    )
    table(
        f"Accuracy on the test split ({agreement['images']} images)",
        ("network", "top-1", "loss", *columns),
        [("float", *floats, "", ""), ("INT8, post-training", *codes, *agrees)],
    )


class _Counts:
    """Correct predictions, summed cross-entropy and images so far; they stay on the device, so that no batch waits."""

    def __init__(self) -> None:
        self.correct: Tensor | int = 0
        self.loss: Tensor | float = 0.0
        self.images = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.correct = self.correct + (logits.argmax(1) == labels).sum()
        self.loss = self.loss + F.cross_entropy(logits.float(), labels, reduction="sum").double()
        self.images += len(labels)

    def accuracy(self, processes: Processes = SINGLE_PROCESS) -> Accuracy:
        correct, loss, images = processes.sums(float(self.correct), float(self.loss), self.images)
        return Accuracy(100 * correct / images, loss / images, int(images))
