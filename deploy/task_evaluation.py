"""Evaluating networks that answer no classes: how right they are, where that is known, and how far outputs agree.

A set with boxes gives a detector's mAP, one with masks a segmentation network's mIoU, each for all who answer. Images
without labels, or those of the reference file, are compared by the SQNR of each output. Images go through in
small batches, so that large outputs need little memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.decoders import Decoder, Limits, decoder_for
from deploy.difference_search import Judgement
from deploy.fitting import Fit, fitted
from deploy.reference import read_reference
from deploy.scores import BoxCounter, PixelCounter, Scores, classes_of_pixels
from deploy.who_answers import FLOAT, PYTORCH, Judged, who_answers
from qat.base.artifact import TensorSpec
from qat.base.console import progress, say, table, warn
from qat.base.errors import UserError
from qat.base.output_agreement import OutputAgreement, OutputSums
from qat.data.annotated_sets import is_annotated, read_annotated
from qat.data.annotations import NO_CLASS, AnnotatedImage, AnnotatedSet

BATCH = 16
_CLASSES_SHOWN = 20

Batch = tuple[np.ndarray, tuple[AnnotatedImage, ...], Mapping[str, Mapping[str, np.ndarray]]]
"""Images uint8 [N, H, W, C]; what is in them, () if that is not known; recorded answers, by who gave them."""


@dataclass(frozen=True)
class Images:
    """What is asked about: batches of images, ``count`` in all, from ``source``; ``known``: the set they belong to."""

    source: str
    count: int
    batches: Callable[[], Iterator[Batch]]
    known: AnnotatedSet | None = None


@dataclass(frozen=True)
class TaskEvaluation(Judgement):
    """How right all are who answered, and how far the judged one agrees with the others.

    Attributes:
        identity: kind and SHA-256 of the file that was judged.
        source, images: what was asked about.
        scores: how right each is, by who answered; {} without labels.
        distances: the judged one's outputs against those of each other, by pair.
        least_sqnr, least_agreement: to what outputs must agree, in dB, and integers, in percent.
        how: how boxes were made, and with which limits.
    """

    identity: Mapping[str, str]
    source: str
    images: int
    scores: Mapping[str, Scores]
    distances: Mapping[str, tuple[OutputAgreement, ...]]
    least_sqnr: float
    least_agreement: float
    how: Mapping[str, Any] = field(default_factory=dict)

    @property
    def disagreements(self) -> dict[str, str]:
        """The pairs that agree too little, each with what was measured and what is demanded.

        Boxes and maps are allowed to differ from the float network's: that is what was measured.
        """
        demand = f"must be at least {self.least_sqnr:g} dB, or {self.least_agreement:g} % of integers"
        found = {}
        for pair, outputs in self.distances.items():
            low = [one for one in outputs if not one.reaches(self.least_sqnr, self.least_agreement)]
            if low and not pair.endswith(FLOAT):
                found[pair] = f"agree too little ({', '.join(map(str, low))}): {demand}"
        return found

    def to_json(self) -> dict[str, Any]:
        """As the file of ``python -m deploy.evaluate --json`` has it."""
        result: dict[str, Any] = {
            **self.identity,
            "images": self.images,
            "source": self.source,
            "top1": {},
            "agreement": {},
            "outputs": {
                f"{pair}, {one.tensor}": {"sqnr_db": one.sqnr_db, "equal_percent": one.equal_percent}
                for pair, outputs in self.distances.items()
                for one in outputs
            },
        }
        if self.scores:
            result["scores"] = {who: scores.to_json() for who, scores in self.scores.items()}
            result["how"] = dict(self.how)
        return result | self.inside()


def evaluate_task(
    judged: Judged,
    images: Images,
    *,
    decoder: str | None,
    limits: Limits,
    least_agreement: float,
    least_sqnr: float,
    pytorch: bool,
    trust: bool,
    trust_code: bool,
) -> tuple[TaskEvaluation, np.ndarray]:
    """Asks everybody about ``images``, and prints the figures.

    Returns them, and the first batch of images. Raises UserError when the network and the labels do not fit, and as
    ``who_answers`` does.
    """
    task = _task(judged, images.known, decoder, limits)
    counters: dict[str, Any] = {}
    sums: dict[str, dict[str, OutputSums]] = {}
    first: np.ndarray | None = None
    answering = who_answers(judged, pytorch=pytorch, trust=trust, trust_code=trust_code)
    with answering as asked, progress("evaluating", images.count) as shown:
        for batch, known, recorded in images.batches():
            first = batch if first is None else first
            answers = {who: dict(answer(batch)) for who, answer in asked.items()} | dict(recorded)
            mine, *others = answers
            for who in others:
                for name, exact in answers[who].items():
                    found = sums.setdefault(f"{mine}, {who}", {}).setdefault(name, OutputSums(name))
                    found.add(exact, answers[mine][name])
            if task is not None:
                for who, outputs in answers.items():
                    counter = counters.setdefault(who, task.counter())
                    for index, image in enumerate(known):
                        one = {name: _as_float(values[index]) for name, values in outputs.items()}
                        task.count(counter, image, one)
            for _ in batch:
                shown.advance()
    assert first is not None, "no image"
    scores = {who: counter.scores() for who, counter in counters.items()}
    distances = {pair: tuple(one.agreement() for one in by_name.values()) for pair, by_name in sums.items()}
    how = task.how if task is not None else {}
    figures = (scores, distances, least_sqnr, least_agreement, how)
    evaluation = TaskEvaluation(judged.identity, images.source, images.count, *figures)
    _print(evaluation, () if images.known is None else images.known.class_names)
    return evaluation, first


def task_images(judged: Judged, data: str | None, most: int | None) -> Images:
    """The images that ``data`` names, at most ``most``; without it, those of the reference file.

    ``data``: a set with boxes or masks, or a folder of images. Raises UserError when it cannot be read.
    """
    preprocessing = judged.onnx_sidecar.preprocessing
    if data is None:
        reference = read_reference(judged.model, judged.onnx_sidecar)
        count = min(len(reference.images), most or len(reference.images))

        def recorded() -> Iterator[Batch]:
            for start in range(0, count, BATCH):
                part = slice(start, min(start + BATCH, count))
                answers = {name: values[part] for name, values in reference.outputs.items()}
                yield reference.images[part], (), {PYTORCH: answers}

        return Images(reference.source, count, recorded)
    if not preprocessing:
        raise UserError(f"{judged.model} does not say how images become inputs: export it with preprocessing")
    path = Path(data).expanduser()
    if is_annotated(path):
        known = read_annotated(path, "val", most)
        say(f"{known.source}: {len(known.images)} images")
        files: list[str] = [image.file for image in known.images]
    elif path.is_dir():
        from qat.base.image_files import all_image_files

        known, (files, notes) = None, all_image_files(path)
        files = files[:most]
        for note in notes:
            say(note)
    else:
        raise UserError(
            f"no folder {path}: for a network that answers no classes give --data set.yaml, instances.json, or a "
            "folder of images, with masks or without"
        )

    def read() -> Iterator[Batch]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(files), BATCH):
                part = files[start : start + BATCH]
                images = np.stack(list(pool.map(lambda file: fitted(file, preprocessing), part)))
                yield images, () if known is None else known.images[start : start + BATCH], {}

    return Images(str(data) if known is None else known.source, len(files), read, known)


# --- tasks


class _Boxes:
    """Counts the boxes of a detector."""

    def __init__(self, decoder: Decoder, known: AnnotatedSet, preprocessing: Mapping[str, Any]) -> None:
        self._decoder, self._known, self._preprocessing = decoder, known, preprocessing
        self._size = (int(preprocessing["height"]), int(preprocessing["width"]))
        decoder.places(np.zeros(0, np.int64), known)  # a set with more classes is refused now
        self.how = {"decoder": decoder.name, **dataclasses.asdict(decoder.limits)}

    def counter(self) -> BoxCounter:
        """A new one."""
        return BoxCounter(self._known.class_names, self._decoder.limits.most_boxes or 100)

    def count(self, counter: BoxCounter, image: AnnotatedImage, outputs: Mapping[str, np.ndarray]) -> None:
        """One image, and the outputs for it."""
        from qat.base.image_files import upright_size

        found = self._decoder.decode(outputs, self._size)
        boxes = Fit.of(upright_size(image.file), self._preprocessing).back(found.boxes)
        counter.add(
            image, dataclasses.replace(found, boxes=boxes, labels=self._decoder.places(found.labels, self._known))
        )


class _Pixels:
    """Counts the pixels of a segmentation network."""

    def __init__(self, spec: TensorSpec, preprocessing: Mapping[str, Any]) -> None:
        self._name, self._classes, self._preprocessing = spec.name, spec.shape[1], preprocessing
        if len(spec.shape) == 3:
            self._classes = NO_CLASS
        self._size = (int(preprocessing["height"]), int(preprocessing["width"]))
        self.how = {"output": spec.name, "masks": "resized as the images, nearest pixel"}

    def counter(self) -> PixelCounter:
        """A new one."""
        return PixelCounter(self._classes)

    def count(self, counter: PixelCounter, image: AnnotatedImage, outputs: Mapping[str, np.ndarray]) -> None:
        """One image, and the outputs for it."""
        from qat.base.image_files import upright_size
        from qat.data.mask_folders import read_mask

        true = read_mask(image.mask)
        size = upright_size(image.file)
        if true.shape != size[::-1]:
            raise UserError(
                f"mask {image.mask} has {true.shape[1]}x{true.shape[0]} pixels, its image {size[0]}x{size[1]}: must be "
                "equal"
            )
        expected = Fit.of(size, self._preprocessing).mask(true, NO_CLASS)
        counter.add(expected, classes_of_pixels(outputs[self._name], self._size), NO_CLASS)


def _task(judged: Judged, known: AnnotatedSet | None, decoder: str | None, limits: Limits) -> _Boxes | _Pixels | None:
    """What is counted; None without labels."""
    if known is None:
        if decoder is not None:
            raise UserError("--decoder makes boxes to count, which needs --data with boxes: set.yaml or instances.json")
        return None
    preprocessing = judged.onnx_sidecar.preprocessing
    if known.masks:
        maps = [spec for spec in judged.outputs if len(spec.shape) == 4 or _is_map_of_classes(spec)]
        if not maps:
            names = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in judged.outputs[:4])
            raise UserError(
                f"{known.source} has masks, and none of the outputs {names} is [N, classes, H, W]: give other --data"
            )
        return _Pixels(maps[0], preprocessing)
    checkpoint = judged.checkpoint()
    model = checkpoint[1].details["model"] if checkpoint else None
    made = decoder_for(judged.outputs, decoder, limits, model, len(known.class_names))
    if made.classes is not None and made.classes > len(known.class_names) and not made.numbered:
        warn(f"the network tells {made.classes} classes, {known.source} has {len(known.class_names)}: its first ones")
    return _Boxes(made, known, preprocessing)


def _is_map_of_classes(spec: TensorSpec) -> bool:
    return len(spec.shape) == 3 and np.issubdtype(np.dtype(spec.dtype), np.integer)


def _as_float(values: np.ndarray) -> np.ndarray:
    """Halves as float32; integers stay."""
    return values.astype(np.float32) if np.issubdtype(values.dtype, np.floating) else values


def _print(evaluation: TaskEvaluation, names: tuple[str, ...]) -> None:
    title = f"{evaluation.images} images: {evaluation.source}"
    if evaluation.scores:
        figures = list(next(iter(evaluation.scores.values())).figures)
        rows = [(who, *(f"{one.figures[name]:.2f} %" for name in figures)) for who, one in evaluation.scores.items()]
        table(title, ("who", *figures), rows)
        of_all = list(evaluation.scores.values())
        shown = list(of_all[0].by_class)[:_CLASSES_SHOWN]
        cells = [(name, *(_percent(one.by_class[name]) for one in of_all)) for name in shown]
        more = f", the first {len(shown)}" if len(of_all[0].by_class) > len(shown) else ""
        table(f"{figures[0]} by class{more}", ("class", *evaluation.scores), cells)
        say(", ".join(f"{name} {value}" for name, value in evaluation.how.items() if value is not None))
    pairs = [(pair, one.tensor, one.measured) for pair, found in evaluation.distances.items() for one in found]
    if pairs:
        table(title, ("who", "output", "agreement"), pairs)
    else:
        warn("there is nothing to compare it with: neither ONNX Runtime nor answers of PyTorch")
    for pair, said in evaluation.disagreements.items():
        warn(f"{pair} {said}")


def _percent(value: float | None) -> str:
    return "absent" if value is None else f"{value:.2f} %"
