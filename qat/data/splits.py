"""Loads image data sets in disjoint splits: train, calibration, validation, test.

Each split has one use: weights are trained on train, activation ranges come from calibration, the best epoch is chosen
on validation, and reported accuracies are measured on test. A split that a source does not have is taken out of the
training images, stratified by class; the choice depends only on the seed. Images without labels have only two splits,
calibration and test.

Layouts: N images, C channels (RGB or grey), H height, W width. Images are uint8, 0..255, until they are
normalized on the device that trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.base.console import say
from qat.base.errors import UserError
from qat.data.batches import ImageSet
from qat.data.folders import unlabelled_files
from qat.data.parts import NO_LABEL, Part, Source
from qat.data.pixels import MEMORY_LIMIT, ArrayPixels, FilePixels, Pixels, decode_all, in_grey
from qat.data.preprocessing import Augmentation, ImagePreset, Preprocessing
from qat.data.sources import read_source

IMAGENET_PRESET = ImagePreset()
_SMALL = 64  # pixels; in training, images up to this size are shifted, larger ones are cropped and resized

# Shares of the training images for splits taken out of them. Calibration gets at most 1/4 of what the others leave.
_TEST_SHARE, _VALIDATION_SHARE, _CALIBRATION_SHARE, _CALIBRATION_MOST = 1 / 5, 1 / 10, 1 / 10, 1 / 4
_CALIBRATION_LEAST = 64  # images, if there are enough
_SHARE_OF_GPU = 1 / 4  # of the free memory
SPLITS = ("train", "calibration", "validation", "test")
_HELD_OUT_MOST = 1024  # images without labels to measure on; an agreement of 99 % is then known to within 0.3 points


@dataclass(frozen=True)
class Data:
    """The four splits, which have no image in common. ``notes`` say how they were made, one line for each.

    Without labels there are no class names, and train and validation are empty. ``all_classes``: whether there can be
    no more classes than ``class_names``.
    """

    train: ImageSet
    calibration: ImageSet
    validation: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    notes: tuple[str, ...]
    source: str
    all_classes: bool = True

    def on(self, device: torch.device) -> Data:
        """The same data, with the splits that are ready in the memory of a GPU if they take at most a quarter of it.

        Nothing moves if train is not ready, or to a CPU.
        """
        if not self.train.ready:
            return self
        sets = {name: split for name in SPLITS if (split := getattr(self, name)).ready}
        stores = {id(split.pixels): split.pixels.images for split in sets.values()}
        size = sum(images.nbytes for images in stores.values())
        if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] * _SHARE_OF_GPU:
            return self
        moved = {key: ArrayPixels(images.to(device)) for key, images in stores.items()}
        for name, split in sets.items():
            pixels, indices, labels = moved[id(split.pixels)], split.indices.to(device), split.labels.to(device)
            sets[name] = replace(split, pixels=pixels, indices=indices, labels=labels)
        return replace(self, **sets)

    @property
    def labelled(self) -> bool:
        """Whether there are labels, so that accuracies can be measured; if not, every label is NO_LABEL."""
        return bool(self.class_names)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of images in every split that is not empty."""
        sizes = {name: len(getattr(self, name)) for name in SPLITS}
        return {name: size for name, size in sizes.items() if size}


def load_data(
    source: str,
    image_size: int | None,
    seed: int,
    calibration_images: int = 512,
    root: Path = Path("data"),
    preset: ImagePreset = IMAGENET_PRESET,
) -> Data:
    """The data set ``source`` in four disjoint splits.

    Args:
        source: 'digits', an image folder of classes, in train/ and val/ or not, an .npz file, or 'torchvision:NAME'.
        image_size: height and width of the network's input in pixels; None: the size that suits the data.
        seed: determines which images go into the splits that are taken out of the training images.
        calibration_images: largest number of images in the calibration split.
        root: folder in which torchvision's data sets are found, or to which they are downloaded.
        preset: how photographs are preprocessed; mean and deviation apply to other images too, and their number says
            whether images are in color or in grey.

    Raises:
        UserError: the source is unknown, damaged or too small.
    """
    _check_request(image_size, seed, calibration_images)
    found = read_source(source, root)
    if preset.channels == 1:
        found = found.in_grey()
    preprocessing = _preprocessing(found.default_size, found.cropped, source, image_size, preset)
    augmentation = _augmentation(found, source, preprocessing)
    if augmentation.padding:
        found = _resize_once(found, preprocessing)
    indices, notes = _split(found, source, seed, calibration_images)

    def image_set(name: str, part: Part | None) -> ImageSet:
        part = part or found.train
        chosen = indices.get(name, torch.arange(len(part.labels)))
        changes = augmentation if name == "train" else None
        return ImageSet(part.pixels, chosen, part.labels[chosen], preprocessing, changes)

    return Data(
        image_set("train", None),
        image_set("calibration", None),
        image_set("validation", found.validation),
        image_set("test", found.test),
        found.class_names,
        preprocessing,
        (*found.notes, *notes),
        source,
        found.all_classes,
    )


def load_unlabelled(
    folder: Path,
    image_size: int | None,
    seed: int,
    calibration_images: int = 512,
    preset: ImagePreset = IMAGENET_PRESET,
) -> Data:
    """Images without labels: all in ``folder`` and its subfolders, whose names have no meaning, or those of a set.

    A set is one of the forms of qat/data/annotated_sets.py; its training images are taken.

    The seed chooses up to ``calibration_images`` of them for calibration. The rest, but at least a fifth of all and at
    most 1024, are the test split, on which two networks can be compared. The other arguments are as in ``load_data``.

    Raises:
        UserError: there is no image, or a chosen image is corrupt.
    """
    _check_request(image_size, seed, calibration_images)
    files, notes = unlabelled_files(folder)
    total = len(files)
    test = min(_HELD_OUT_MOST, max(total - calibration_images, int(_TEST_SHARE * total)))
    counts = {"test": test, "calibration": min(calibration_images, total - test)}
    groups = stratified_split(torch.full((total,), NO_LABEL), list(counts.values()), seed)
    paths = [files[index] for group in groups[:2] for index in group.tolist()]
    pixels: Pixels = FilePixels(paths, decode_all(paths))
    if preset.channels == 1:
        pixels = in_grey(pixels)
    preprocessing = _preprocessing(None, False, str(folder), image_size, preset)

    def image_set(start: int, stop: int) -> ImageSet:
        return ImageSet(pixels, torch.arange(start, stop), torch.full((stop - start,), NO_LABEL), preprocessing)

    none = image_set(0, 0)
    reasons = {
        "test": f"a fifth, at most {_HELD_OUT_MOST}, or what calibration leaves",
        "calibration": "the most that was asked for" if counts["calibration"] == calibration_images else "all others",
    }
    notes += tuple(
        f"{name}: {count} of {total} images, chosen by the seed: {reasons[name]}"
        for name, count in counts.items()
        if count
    )
    return Data(none, image_set(test, len(paths)), none, image_set(0, test), (), preprocessing, notes, str(folder))


def stratified_split(labels: Tensor, counts: Sequence[int], seed: int) -> list[Tensor]:
    """Splits images at random into disjoint groups in which every class has its share.

    Args:
        labels: int64 [N].
        counts: number of images in each group.
        seed: the result depends only on it, ``labels`` and ``counts``.

    Returns:
        Indices (int64, ascending): one group for each count, and a last group with all other images. In every group the
        number of images of a class differs from its share by about one. If the last group holds more than half of all
        images, a class of one image is in it.
    """
    classes = labels.numpy()
    shuffled = np.random.RandomState(seed).permutation(len(classes))  # its stream is the same in all NumPy versions
    position = np.empty(len(classes))  # position of an image within its class, from 0 to 1
    for label in np.unique(classes):
        members = np.flatnonzero(classes[shuffled] == label)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = shuffled[np.argsort(position, kind="stable")]  # every part of it has all classes in proportion
    return [torch.from_numpy(np.sort(group)) for group in np.split(order, np.cumsum(counts))]


def _check_request(image_size: int | None, seed: int, calibration_images: int) -> None:
    if image_size is not None and image_size < 1:
        raise UserError(f"image size {image_size} is not positive: give the height and width in pixels")
    if calibration_images < 1:
        raise UserError(f"--calibration-images {calibration_images} is too few: it must be at least 1")
    if not 0 <= seed < 1 << 32:
        raise UserError(f"seed {seed} is out of range: it must be from 0 to {(1 << 32) - 1}")


def _preprocessing(
    default_size: tuple[int, int] | None, cropped: bool, source: str, image_size: int | None, preset: ImagePreset
) -> Preprocessing:
    height, width = (image_size, image_size) if image_size else default_size or (preset.size, preset.size)
    short = min(height, width)
    if not cropped and short > _SMALL:
        short = round(short * preset.short_side / preset.size)
    usual = IMAGENET_PRESET.in_channels(preset.channels)
    if source == "digits" and (preset.mean, preset.std) == (usual.mean, usual.std):  # no others are asked for
        preset = replace(preset, mean=(0.305,) * preset.channels, std=(0.376,) * preset.channels)
    return Preprocessing.from_preset(preset, height, width, short)


def _augmentation(found: Source, source: str, preprocessing: Preprocessing) -> Augmentation:
    short = min(preprocessing.height, preprocessing.width)
    padding = math.ceil(short / (16 if source == "digits" else 8)) if short <= _SMALL else 0
    return Augmentation(padding, found.mirrors)


def _resize_once(found: Source, preprocessing: Preprocessing) -> Source:
    """``found`` with small in-memory images resized once to the network's size, if the result fits in memory."""
    parts = {name: getattr(found, name) for name in ("train", "validation", "test")}
    arrays = {name: part for name, part in parts.items() if part and isinstance(part.pixels, ArrayPixels)}
    count = sum(len(part.labels) for part in arrays.values())
    if count * preprocessing.channels * preprocessing.resize**2 > MEMORY_LIMIT:
        return found
    for name, part in arrays.items():
        arrays[name] = Part(ArrayPixels(preprocessing.fit(part.pixels.images)), part.labels)
    return replace(found, **arrays)


def _calibration_count(left: int, most: int) -> tuple[int, str]:
    """How many of ``left`` training images calibrate, ``most`` of which were asked for, and why that many."""
    tenth = int(_CALIBRATION_SHARE * left)
    limits = (
        (most, "the most that was asked for"),
        (int(_CALIBRATION_MOST * left), "at most a quarter of what is left"),
        (tenth, "a tenth of what is left")
        if tenth >= _CALIBRATION_LEAST
        else (_CALIBRATION_LEAST, "enough for ranges"),
    )
    return min(limits, key=lambda limit: limit[0])


def _split(found: Source, source: str, seed: int, calibration_images: int) -> tuple[dict[str, Tensor], list[str]]:
    """Indices into the training images for train and the splits taken out of it, and notes that say how."""
    total = len(found.train.labels)
    counts = {}
    if found.test is None:
        counts["test"] = round(_TEST_SHARE * total)
    if found.validation is None:
        counts["validation"] = int(_VALIDATION_SHARE * total)
    left = total - sum(counts.values())
    counts["calibration"], reason = _calibration_count(left, calibration_images)
    reasons = {"test": "a fifth", "validation": "a tenth", "calibration": reason}
    for name, count in counts.items():
        if count == 0:
            least = 4 if found.validation else math.ceil(1 / _VALIDATION_SHARE)
            raise UserError(
                f"{source} has {total} training images, too few for a {name} split: add images, there must be at "
                f"least {least}"
            )
    groups = stratified_split(found.train.labels, list(counts.values()), seed)
    notes = [
        f"{name}: {count} of {total} images, held out of training, stratified by class: {reasons[name]}"
        for name, count in counts.items()
    ]
    return dict(zip([*counts, "train"], groups, strict=True)), notes


def say_data(data: Data) -> None:
    """Prints which images there are, and how they were split."""
    sizes = ", ".join(f"{name} {size}" for name, size in data.sizes.items())
    classes = f"{len(data.class_names)} classes" if data.labelled else "no labels"
    color = " in grey" if data.preprocessing.color == "grey" else ""
    size = f"{data.preprocessing.height}x{data.preprocessing.width} pixels{color}"
    say(f"data {data.source}: {classes}, {size}; images: {sizes}")
    for note in data.notes:
        say(f"  {note}")
