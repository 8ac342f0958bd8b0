"""How right a detector or a segmentation network is: mAP by pycocotools, mIoU from a matrix of confusion.

mAP is COCO's: average precision over 101 recalls, averaged over intersections over union of 0.5 to 0.95, then over
the classes that occur. mIoU is that of torchvision's reference scripts: for each class the pixels that are right,
divided by those that are or were said to be of it; averaged over classes that are or were said. Its matrix is one line
of NumPy, so that a machine with an engine needs no further package.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.decoders import Found
from qat.base.errors import UserError
from qat.data.annotations import AnnotatedImage

MAP, MAP50 = "mAP50-95", "mAP50"
MIOU, PIXELS = "mIoU", "pixel accuracy"


@dataclass(frozen=True)
class Scores:
    """Figures in percent by their names, the one that counts first; and that one for each class, None if absent."""

    figures: Mapping[str, float]
    by_class: Mapping[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """For the file of results."""
        return {"figures": dict(self.figures), "by_class": dict(self.by_class)}


class BoxCounter:
    """Boxes that were found, against those of the images."""

    def __init__(self, class_names: Sequence[str], most_boxes: int) -> None:
        if importlib.util.find_spec("pycocotools") is None:
            raise UserError("mAP is measured by pycocotools, which is not installed: pip install pycocotools PyYAML")
        self._names, self._most = class_names, most_boxes
        self._truth: list[dict[str, Any]] = []
        self._found: list[list[float]] = []
        self._images = 0

    def add(self, image: AnnotatedImage, found: Found) -> None:
        """One image; boxes in pixels of it."""
        self._images += 1
        for box, label, crowd in zip(image.boxes, image.labels, image.crowd, strict=True):
            left, top, right, bottom = map(float, box)
            width, height = right - left, bottom - top
            self._truth.append(
                {
                    "id": len(self._truth) + 1,
                    "image_id": self._images,
                    "category_id": int(label) + 1,
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": int(crowd),
                }
            )
        known = (found.labels >= 0) & (found.labels < len(self._names))
        for box, score, label in zip(found.boxes[known], found.scores[known], found.labels[known], strict=True):
            left, top, right, bottom = map(float, box)
            self._found.append([self._images, left, top, right - left, bottom - top, float(score), int(label) + 1])

    def scores(self) -> Scores:
        """mAP50-95, mAP50, and the AP of each class, in percent. Raises UserError when no image has a box."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if not self._truth:
            raise UserError("no image has a box, so that there is no mAP: give --data with labels, or more --images")
        places = range(1, len(self._names) + 1)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
            truth = COCO()
            truth.dataset = {
                "images": [{"id": image} for image in range(1, self._images + 1)],
                "categories": [{"id": place} for place in places],
                "annotations": self._truth,
            }
            truth.createIndex()
            if not self._found:
                return Scores({MAP: 0.0, MAP50: 0.0}, self._by_class(np.where(self._occurs(), 0.0, np.nan)))
            judged = COCOeval(truth, truth.loadRes(np.array(self._found)), "bbox")
            judged.params.maxDets = [self._most]
            judged.params.areaRng, judged.params.areaRngLbl = judged.params.areaRng[:1], judged.params.areaRngLbl[:1]
            judged.evaluate()
            judged.accumulate()
        precision_TRK = judged.eval["precision"][:, :, :, 0, -1]  # overlaps, recalls, classes
        by_overlap_TK = np.where(precision_TRK > -1, precision_TRK, np.nan).mean(1)[:, self._occurs()]
        by_class = np.full(len(self._names), np.nan)
        by_class[self._occurs()] = by_overlap_TK.mean(0)
        return Scores(
            {MAP: float(100 * by_overlap_TK.mean()), MAP50: float(100 * by_overlap_TK[0].mean())},
            self._by_class(by_class),
        )

    def _occurs(self) -> np.ndarray:
        """bool [classes]: which have a box that is to be found."""
        found = np.zeros(len(self._names), bool)
        found[[one["category_id"] - 1 for one in self._truth if not one["iscrowd"]]] = True
        return found

    def _by_class(self, shares: np.ndarray) -> dict[str, float | None]:
        return dict(zip(self._names, _percent(shares), strict=True))


class PixelCounter:
    """Classes of pixels that were found, against those of the masks."""

    def __init__(self, classes: int) -> None:
        self._matrix = np.zeros((classes, classes), np.int64)  # [true, found]

    def add(self, true_HW: np.ndarray, found_HW: np.ndarray, no_class: int) -> None:
        """One image; pixels of ``no_class`` do not count. Raises UserError for classes that are not there."""
        classes, counts = len(self._matrix), true_HW != no_class
        true, found = true_HW[counts].astype(np.int64), found_HW[counts].astype(np.int64)
        if len(true) and true.max() >= classes:
            raise UserError(
                f"the masks have class {true.max()}, and the network tells {classes} classes, from 0 to {classes - 1}: "
                f"correct the masks, or mark pixels without a class with {no_class}"
            )
        self._matrix += np.bincount(classes * true + found, minlength=classes**2).reshape(classes, classes)

    def scores(self) -> Scores:
        """mIoU, pixel accuracy, and the IoU of each class, in percent. Raises UserError when no pixel has a class."""
        right, all_pixels = np.diag(self._matrix), self._matrix.sum()
        if not all_pixels:
            raise UserError("no pixel of the masks has a class: check them")
        union = self._matrix.sum(0) + self._matrix.sum(1) - right
        shares = np.divide(right, union, out=np.full(len(right), np.nan), where=union > 0)
        by_class = dict(zip(map(str, range(len(right))), _percent(shares), strict=True))
        return Scores({MIOU: float(100 * np.nanmean(shares)), PIXELS: float(100 * right.sum() / all_pixels)}, by_class)


def classes_of_pixels(answer: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The class of each pixel of the input, uint8 [height, width], from the output for one image.

    ``answer``: [classes, h, w], of which the largest counts, or classes [h, w] as integers. Smaller maps are resized
    bilinearly before that, as torchvision's models do themselves. ``size``: (height, width).
    """
    from PIL import Image

    if answer.ndim == 2:
        whole = Image.fromarray(answer.astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
        return np.asarray(whole)
    if answer.shape[1:] != size:
        planes = [Image.fromarray(plane.astype(np.float32)) for plane in answer]
        answer = np.stack([np.asarray(plane.resize(size[::-1], Image.Resampling.BILINEAR)) for plane in planes])
    classes_HW: np.ndarray = answer.argmax(0).astype(np.uint8)
    return classes_HW


def _percent(shares: np.ndarray) -> list[float | None]:
    return [None if np.isnan(share) else float(100 * share) for share in shares]
