"""Whether a classifier answers what was trained: its accuracy, and its agreement with PyTorch and with ONNX Runtime.

What is judged is an engine, or an ONNX file in ONNX Runtime. The images are those of the reference file beside the ONNX
file, with PyTorch's answers, or the test split of a data set.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.difference_search import Judgement
from deploy.reference import read_reference
from deploy.who_answers import ENGINE, PYTORCH, Answer, Judged, who_answers
from qat.base.artifact import Sidecar, read_parent
from qat.base.console import table, warn
from qat.base.errors import UserError

BATCH = 256

ImageBatch = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Images uint8 [N, H, W, 3], labels int64 [N], and PyTorch's answers float32 [N, values] if they are known."""


@dataclass(frozen=True)
class Answers:
    """What was asked and answered.

    Attributes:
        source: where the images come from.
        labels: int64 [N], -1 for an image without a label.
        logits: float32 [N, classes] by who answered: the engine, ONNX Runtime, PyTorch; the one that is judged first.
    """

    source: str
    labels: np.ndarray
    logits: dict[str, np.ndarray]

    @property
    def judged(self) -> str:
        """Whose answers are judged by those of the others."""
        return next(iter(self.logits))

    def accuracy(self, who: str) -> float | None:
        """Top-1 accuracy in percent of the labelled images; None if there are none."""
        labelled = self.labels >= 0
        if not labelled.any():
            return None
        return float(100 * (self.logits[who].argmax(1) == self.labels)[labelled].mean())

    def agreement(self, one: str, other: str) -> float:
        """Share of images with the same top-1 class, in percent."""
        return float(100 * (self.logits[one].argmax(1) == self.logits[other].argmax(1)).mean())

    def agreements(self) -> dict[str, float]:
        """Agreement of the judged one with each other one, in percent."""
        mine, *others = self.logits
        return {f"{mine}, {who}": self.agreement(mine, who) for who in others}

    def disagreements(self, least_agreement: float) -> dict[str, str]:
        """The pairs that agree on less than ``least_agreement`` percent, with what was measured and is demanded."""
        demand = f"must be at least {least_agreement:g} %"
        return {
            pair: f"choose the same class on {share:.2f} % of the images: {demand}"
            for pair, share in self.agreements().items()
            if share < least_agreement
        }


@dataclass(frozen=True)
class Evaluation(Judgement):
    """The answers of a classifier, and whether it agrees with the others.

    Attributes:
        identity: kind and SHA-256 of the file that was judged.
        answers: its answers and those of the others.
        least_agreement: share of images, in percent, on which the others must choose the same class.
    """

    identity: Mapping[str, str]
    answers: Answers
    least_agreement: float

    @property
    def disagreements(self) -> dict[str, str]:
        """The pairs that agree too little."""
        return self.answers.disagreements(self.least_agreement)

    def to_json(self) -> dict[str, Any]:
        """As the file of ``python -m deploy.evaluate --json`` has it."""
        answers = self.answers
        return {
            **self.identity,
            "images": len(answers.labels),
            "source": answers.source,
            "top1": {who: answers.accuracy(who) for who in answers.logits},
            "agreement": answers.agreements(),
            **self.inside(),
        }


def evaluate_classes(
    judged: Judged,
    *,
    data: str | None,
    data_root: Path,
    images: int | None,
    least_agreement: float,
    trust: bool,
) -> tuple[Evaluation, np.ndarray]:
    """Asks everybody about the same images, and prints the figures.

    Returns them, and the first images. ``data``: a data set as for qat.train, of which the test split is used; None for
    the reference file. Raises UserError when the images cannot be read, and as ``who_answers`` does.
    """
    if data is None:
        source, batches = reference_batches(judged.model, judged.onnx_sidecar, images)
    else:
        source, batches = data_set_batches(judged.model, judged.onnx_sidecar, data, data_root, images)
    with who_answers(judged, pytorch=False, trust=trust) as asked:
        answers, first = _collect_answers(asked, source, batches)
    evaluation = Evaluation(judged.identity, answers, least_agreement)
    _print_answers(evaluation)
    return evaluation, first


def reference_batches(model: Path, sidecar: Sidecar, images: int | None) -> tuple[str, Iterator[ImageBatch]]:
    """The source of the reference file beside the ONNX file ``model``, and its images, at most ``images`` of them."""
    reference = read_reference(model, sidecar)
    count = min(len(reference.images), images or len(reference.images))

    def batches() -> Iterator[ImageBatch]:
        for start in range(0, count, BATCH):
            part = slice(start, min(start + BATCH, count))
            yield reference.images[part], reference.labels[part], reference.logits[part]

    return reference.source, batches()


def data_set_batches(
    model: Path, sidecar: Sidecar, data: str, data_root: Path, images: int | None
) -> tuple[str, Iterator[ImageBatch]]:
    """The source of a data set's test split, and its images, at most ``images`` of them. Needs torch."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("--data needs torch: install it, or leave --data out and use the reference file")
    return f"the test split of {data}", _test_split(model, sidecar, data, data_root, images)


def _test_split(model: Path, sidecar: Sidecar, data: str, data_root: Path, images: int | None) -> Iterator[ImageBatch]:
    from qat.data.batches import first_batches
    from qat.data.preprocessing import ImagePreset
    from qat.data.splits import load_data

    try:
        details = read_parent(model, sidecar, "checkpoint")[1].details
    except UserError as error:
        warn(f"without the checkpoint, a test split that training made itself cannot be made again: {error}")
        details = {"seed": 0, "calibration_images": 512}
    given = sidecar.preprocessing
    preset = ImagePreset.of_sidecar(given)
    seed, calibration_images = details.get("seed", 0), details.get("calibration_images", 512)
    data_set = load_data(data, given["height"], seed, calibration_images, data_root, preset)
    count = len(data_set.test) if images is None else images
    for x_NCHW, labels in first_batches(data_set.test, count, BATCH):
        yield x_NCHW.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy(), None


def _collect_answers(
    asked: Mapping[str, Answer], source: str, batches: Iterator[ImageBatch]
) -> tuple[Answers, np.ndarray]:
    """The answers of all, and the first batch of images."""
    logits: dict[str, list[np.ndarray]] = {}
    labels: list[np.ndarray] = []
    first: np.ndarray | None = None
    for images, given_labels, pytorch in batches:
        first = images if first is None else first
        labels.append(given_labels)
        for who, answer in asked.items():
            (found,) = answer(images).values()
            logits.setdefault(who, []).append(found)
        if pytorch is not None:
            logits.setdefault(PYTORCH, []).append(pytorch)
    assert first is not None, "no image"
    by_who = {who: np.concatenate(parts) for who, parts in logits.items()}
    return Answers(source, np.concatenate(labels), by_who), first


def _print_answers(evaluation: Evaluation) -> None:
    answers, rows = evaluation.answers, []
    for who in answers.logits:
        accuracy = answers.accuracy(who)
        same = "" if who == answers.judged else f"{answers.agreement(answers.judged, who):.2f} %"
        rows.append((who, "no labels" if accuracy is None else f"{accuracy:.2f} %", same))
    judged = "the engine" if answers.judged == ENGINE else answers.judged
    table(f"{len(answers.labels)} images: {answers.source}", ("who", "top-1", f"same class as {judged}"), rows)
    for pair, said in evaluation.disagreements.items():
        warn(f"{pair} {said}")
    if len(answers.logits) == 1:
        warn(f"there is nothing to compare {judged} with")
