"""The exported file against the float network as it was given, and against the figures that training recorded.

Parity (export/parity.py) says that the file computes what its own trace computes. The trace, the folding and the
quantization are judged here by what does not come from them: the model's own code with the same weights, and accuracies
that were measured when the checkpoint was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.reference import Sample
from export.trained_network import TrainedNetwork
from qat.base.output_agreement import OutputAgreement
from qat.data.parts import NO_LABEL
from qat.graph.outputs import leaves

_SURE = 3.0  # standard deviations
_ROUNDING = 0.01  # share of images whose class may depend on how a machine rounds


@dataclass(frozen=True)
class FloatAgreement:
    """How far a file's answers are from those of the float network ``name`` on ``images`` inputs.

    ``other_top1``: of a classifier, how many images get another class; None for another network.
    """

    name: str
    images: int
    other_top1: int | None
    outputs: tuple[OutputAgreement, ...]

    def __str__(self) -> str:
        classes = "" if self.other_top1 is None else f"{self.other_top1} of {self.images} images with another top-1, "
        return f"{classes}{', '.join(map(str, self.outputs))}"


def against_float(
    network: TrainedNetwork,
    paths: Sequence[str],
    batches: Iterable[Sequence[Tensor]],
    found: Sequence[tuple[str, Tensor]],
    *,
    logits: bool,
) -> FloatAgreement:
    """Compares a file's answers with those of the float network.

    Args:
        network: what was exported.
        paths: where the outputs are in its answer.
        batches: its inputs, float32 [N, ...] each.
        found: the file's outputs on all of them, by name, in the order of ``paths``.
        logits: whether the only output is logits [N, classes].
    """
    name, own = network.float_network()
    with torch.no_grad():
        answers = [dict(leaves(own(*inputs))) for inputs in batches]
    ours = [torch.cat([answer[path] for answer in answers]) for path in paths]
    outputs = tuple(
        OutputAgreement.measure(output, mine.numpy(), other.numpy())
        for mine, (output, other) in zip(ours, found, strict=True)
    )
    other_top1 = int((ours[0].argmax(1) != found[0][1].argmax(1)).sum()) if logits else None
    return FloatAgreement(name, len(ours[0]), other_top1, outputs)


@dataclass(frozen=True)
class Recorded:
    """A file's top-1 accuracy in percent on ``images`` test images, and what the checkpoint recorded for its network.

    ``recorded_images``: how many the recorded accuracy was measured on; those here are some of them, or all.
    """

    top1: float
    images: int
    recorded_top1: float
    recorded_images: int

    @property
    def explained(self) -> bool:
        """Whether choosing these images, and rounding, explain the difference."""
        share, left_out = self.recorded_top1 / 100, 1 - min(self.images / self.recorded_images, 1)
        chance = _SURE * math.sqrt(share * (1 - share) * left_out / self.images)
        return abs(self.top1 - self.recorded_top1) <= 100 * (chance + _ROUNDING + 1 / self.images)

    def __str__(self) -> str:
        return (
            f"{self.top1:.2f} % of {self.images} test images right; the checkpoint recorded {self.recorded_top1:.2f} % "
            f"of {self.recorded_images}"
        )


def against_recorded(figures: Mapping[str, Any], precision: str, compared: Sample, logits: Tensor) -> Recorded | None:
    """``logits`` [N, classes] on the images ``compared``, against the figures of a checkpoint.

    None when the checkpoint recorded no accuracy of such a network, or the images have no labels.
    """
    quantized = next((name for name in ("qat", "ptq") if name in figures), None)
    stage = quantized if precision == "int8" else "float" if quantized == "ptq" else None  # "qat" changed the weights
    if stage is None or bool((compared.labels == NO_LABEL).any()):
        return None
    top1 = 100 * float((logits.argmax(1) == compared.labels).double().mean())
    return Recorded(top1, len(logits), figures[stage]["test_top1"], figures[stage]["test_images"])
