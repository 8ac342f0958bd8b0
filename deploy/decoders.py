"""How the outputs of a detector become boxes: built in for Ultralytics, torchvision's own code for its detectors.

A decoder sees the outputs for one image, without the batch, and gives boxes in pixels of the network's input. Any other
network needs a function of its own, path/file.py:function.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qat.base.artifact import TensorSpec
from qat.base.errors import UserError, one_line
from qat.base.text import did_you_mean
from qat.base.trust import NotTrustedError
from qat.base.user_code import run_file
from qat.data.annotations import AnnotatedSet

_MOST_CANDIDATES = 30000
_TORCHVISION, _ULTRALYTICS = "cls_logits", "detections"
_END_TO_END = 6  # left, top, right, bottom, score, class
NEEDED = "give --decoder path/file.py:function, which makes boxes of them"


@dataclass(frozen=True)
class Limits:
    """What counts as found, as mAP is measured in the field; None for what is usual with the decoder.

    Attributes:
        least_score: boxes with less are dropped. 0.001; of torchvision's detectors their own.
        most_overlap: of two boxes of a class with a larger intersection over union, the better one stays. 0.7, as
            Ultralytics validates; of torchvision's detectors their own.
        most_boxes: of an image, the best ones. 300 of Ultralytics' and torchvision's, else 100 as COCO has it.
    """

    least_score: float | None = None
    most_overlap: float | None = None
    most_boxes: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("--least-score", self.least_score), ("--most-overlap", self.most_overlap)):
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{option} {value:g}: must be from 0 to 1")
        if self.most_boxes is not None and self.most_boxes < 1:
            raise UserError(f"--most-boxes {self.most_boxes}: must be at least 1")


@dataclass(frozen=True, eq=False)
class Found:
    """Boxes of an image: float [n, 4] left, top, right, bottom in pixels; scores float [n]; labels int64 [n]."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def best(self, limits: Limits) -> Found:
        """Those that ``limits`` leave without looking at overlap, the best first."""
        order = np.argsort(-self.scores, kind="stable")
        order = order[self.scores[order] > (limits.least_score or 0.0)][: limits.most_boxes]
        return Found(self.boxes[order], self.scores[order], self.labels[order])


Decode = Callable[[Mapping[str, np.ndarray], tuple[int, int]], Found]
"""Outputs of one image by name, float32 without the batch, and (height, width) of the input -> boxes."""


@dataclass(frozen=True)
class Decoder:
    """``decode`` turns outputs into boxes; ``name`` says how; ``limits`` are those in use.

    ``classes``: how many classes the network tells; None if that is not known. ``numbered``: its labels may be a set's
    own numbers of classes, as torchvision has them.
    """

    name: str
    decode: Decode
    limits: Limits
    classes: int | None = None
    numbered: bool = False

    def places(self, labels: np.ndarray, known: AnnotatedSet) -> np.ndarray:
        """Labels of the network -> places in the class names of ``known``; -1 for what the set does not have.

        A set's own numbers are those from 1 on, 0 being the background, or those of COCO's file, with gaps. Raises
        UserError when the set has more classes than the network.
        """
        count, ids = len(known.class_names), known.category_ids
        if self.classes is not None and self.classes < count:
            raise UserError(
                f"{known.source} has {count} classes, and the network tells {self.classes}: give the set it is for"
            )
        if self.numbered and self.classes == count + 1:
            labels = labels - 1
        elif self.numbered and self.classes is not None and count < max(ids, default=self.classes) < self.classes:
            table = np.full(self.classes, -1)
            table[list(ids)] = np.arange(count)
            labels = table[labels]
        elif self.numbered and self.classes != count:
            raise UserError(
                f"{known.source} has {count} classes, and the network tells {self.classes}, with or without a "
                "background: give the set it is for"
            )
        return np.where(labels < count, labels, -1)


def decoder_for(
    outputs: Sequence[TensorSpec], given: str | None, limits: Limits, model: Mapping[str, Any] | None, classes: int
) -> Decoder:
    """The decoder of a network.

    Args:
        outputs: what the network answers.
        given: path/file.py:function; None for the built-in one of these outputs.
        limits: what counts as found.
        model: how its checkpoint says that it is built: name, num_classes, kwargs. None without a checkpoint.
        classes: how many the images are labelled with.

    Raises UserError when there is none for these outputs, or when it cannot be loaded.
    """
    by_name = {spec.name: spec for spec in outputs}
    if given is not None:
        return _own(given, limits)
    if _ULTRALYTICS in by_name:
        return _ultralytics(by_name, limits, classes)
    if _TORCHVISION in by_name:
        return _torchvision(by_name[_TORCHVISION], limits, model)
    names = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in outputs[:4])
    if {"boxes", "scores"} <= by_name.keys():
        raise UserError(f"the outputs {names} are not decoded: calibrate with --decode, or {NEEDED}")
    if "objectness" in by_name:
        raise UserError(f"the outputs {names} are those of a first stage, which proposes regions: {NEEDED}")
    raise UserError(f"no decoder is built in for the outputs {names}: {NEEDED}")


def suppress(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, most_overlap: float) -> np.ndarray:
    """Non-maximum suppression within each class: the places of the boxes that stay, the best first.

    ``boxes``: float [n, 4], left, top, right, bottom. Of two whose intersection over union is above ``most_overlap``,
    the one with the larger score stays.
    """
    kept: list[int] = []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for label in np.unique(labels):
        left = np.flatnonzero(labels == label)
        left = left[np.argsort(-scores[left], kind="stable")]
        while len(left):
            first, left = left[0], left[1:]
            kept.append(int(first))
            low = np.maximum(boxes[first, :2], boxes[left, :2])
            high = np.minimum(boxes[first, 2:], boxes[left, 2:])
            common = (high - low).clip(0).prod(1)
            left = left[common <= most_overlap * (areas[first] + areas[left] - common)]
    places = np.array(kept, np.int64)
    return places[np.argsort(-scores[places], kind="stable")]


# --- Ultralytics


def _ultralytics(by_name: Mapping[str, TensorSpec], limits: Limits, classes: int) -> Decoder:
    limits = _filled(limits, 0.001, 0.7, 300)
    shape = by_name[_ULTRALYTICS].shape
    if len(shape) == 3 and shape[2] == _END_TO_END < shape[1]:
        return Decoder("Ultralytics, end to end", lambda outputs, _: _end_to_end(outputs, limits), limits)
    own = shape[1] - 4 - (by_name["proto"].shape[1] if "proto" in by_name else 0)  # coefficients of masks come last

    def decode(outputs: Mapping[str, np.ndarray], _: tuple[int, int]) -> Found:
        found = outputs[_ULTRALYTICS]  # [4 + classes + ..., cells]
        return _of_cells(found[:4], found[4 : 4 + min(own, classes)], limits)

    return Decoder("Ultralytics", decode, limits, own)


def _end_to_end(outputs: Mapping[str, np.ndarray], limits: Limits) -> Found:
    found = outputs[_ULTRALYTICS]  # [boxes, 6]
    return Found(found[:, :4], found[:, 4], found[:, 5].astype(np.int64)).best(limits)


def _of_cells(centred: np.ndarray, scores: np.ndarray, limits: Limits) -> Found:
    """Of x and y of the centre, width, height [4, cells], and scores [classes, cells]; a box may be of two classes."""
    labels, cells = np.nonzero(scores > (limits.least_score or 0.0))
    likely = scores[labels, cells]
    if len(likely) > _MOST_CANDIDATES:
        best = np.argsort(-likely, kind="stable")[:_MOST_CANDIDATES]
        labels, cells, likely = labels[best], cells[best], likely[best]
    x, y, width, height = centred[:, cells]
    boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1)
    kept = suppress(boxes, likely, labels, 1.0 if limits.most_overlap is None else limits.most_overlap)
    kept = kept[: limits.most_boxes]
    return Found(boxes[kept], likely[kept], labels[kept])


# --- torchvision


def _torchvision(spec: TensorSpec, limits: Limits, model: Mapping[str, Any] | None) -> Decoder:
    if model is None:
        raise UserError(
            f"the output {spec.name} is that of a detector of torchvision, whose checkpoint says which: put it beside "
            f"the ONNX file, or {NEEDED}"
        )
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            f"boxes of torchvision's {model['name']} are chosen by its own code: install torch, or {NEEDED}"
        )
    from qat.pretrained.named_models import loads_something
    from qat.pretrained.torchvision_detectors import box_chooser

    if wants := loads_something(model["name"], model.get("kwargs", {})):
        raise NotTrustedError(f"the checkpoint beside the ONNX file wants to {wants}, only to choose boxes: {NEEDED}")
    chosen = box_chooser(
        model["name"],
        model["num_classes"],
        model.get("kwargs", {}),
        score_thresh=limits.least_score,
        nms_thresh=limits.most_overlap,
        detections_per_img=limits.most_boxes,
    )
    found, name = Limits(*chosen.limits), f"torchvision's {model['name']}"
    return Decoder(name, lambda outputs, size: Found(*chosen(outputs, size)), found, spec.shape[2], numbered=True)


# --- the user's own


def _own(given: str, limits: Limits) -> Decoder:
    file, _, name = given.rpartition(":")
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--decoder {given}: no file {file or given}; must be path/file.py:function")
    try:
        module = run_file(path, f"_decoder_{path.stem}")
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"{path} cannot be loaded ({type(error).__name__}: {one_line(error)}): correct it") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"{path} has no function {name!r}{did_you_mean(name, vars(module))}: give --decoder FILE:FUNCTION"
        )
    limits = _filled(limits, 0.001, limits.most_overlap, 100)

    def decode(outputs: Mapping[str, np.ndarray], size: tuple[int, int]) -> Found:
        try:
            boxes, scores, labels = (np.asarray(part) for part in function(dict(outputs), size))
        except Exception as error:  # as above
            raise UserError(f"{given} failed ({type(error).__name__}: {one_line(error)}): correct it") from error
        if boxes.shape != (len(scores), 4) or scores.ndim != 1 or labels.shape != scores.shape:
            raise UserError(
                f"{given} gave boxes {list(boxes.shape)}, scores {list(scores.shape)} and labels {list(labels.shape)}: "
                "must be [n, 4], [n] and [n]"
            )
        return Found(boxes.astype(np.float64), scores.astype(np.float64), labels.astype(np.int64)).best(limits)

    return Decoder(given, decode, limits)


def _filled(limits: Limits, least_score: float, most_overlap: float | None, most_boxes: int) -> Limits:
    """``limits`` with what is usual where they say nothing."""
    return replace(
        limits,
        least_score=least_score if limits.least_score is None else limits.least_score,
        most_overlap=most_overlap if limits.most_overlap is None else limits.most_overlap,
        most_boxes=limits.most_boxes or most_boxes,
    )
