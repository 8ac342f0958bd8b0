"""Image data sets and their disjoint splits: train, calibration, validation, test.

Each split has one use: weights learn on train, activation ranges come from calibration, epochs are chosen on
validation, and what is reported is measured on test. Where a source lacks a split, it is carved out of the
training images: stratified by class, a function of the seed alone. Images without labels make two splits: calibration
and test.

Layouts: N images, C channels (RGB), H height, W width. Images are uint8, 0..255, until they are normalized on
the device that trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.base.errors import UserError
from qat.data.batches import ImageSet
from qat.data.parts import NO_LABEL, Part, Source
from qat.data.pixels import MEMORY_LIMIT, ArrayPixels, FilePixels, decode_all
from qat.data.preprocessing import Augmentation, ImagePreset, Preprocessing
from qat.data.sources import read_source, unlabelled_files

IMAGENET_PRESET = ImagePreset()
_SMALL = 64  # pixels; up to here an image is shifted in training, above it is cropped and resized

# Shares of the training images that carved-out splits get. Of what is left at least 3/4 remain for training.
_TEST_SHARE, _VALIDATION_SHARE, _CALIBRATION_SHARE, _CALIBRATION_MOST = 1 / 5, 1 / 10, 1 / 10, 1 / 4
_CALIBRATION_LEAST = 64  # images, where there are as many
_SHARE_OF_GPU = 1 / 4  # of the memory that is free
SPLITS = ("train", "calibration", "validation", "test")
_HELD_OUT_MOST = 1024  # images without labels to measure on: an agreement of 99 % is known to 0.3 points


@dataclass(frozen=True)
class Data:
    """The four splits, which have no image in common. ``notes`` say how they were made, a line each.

    Without labels there are no class names, and no images in train and validation.
    """

    train: ImageSet
    calibration: ImageSet
    validation: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    notes: tuple[str, ...]
    source: str

    def on(self, device: torch.device) -> Data:
        """The same, on a GPU with the splits that are ready in its memory, if train is, where a quarter of it does."""
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
        """Whether accuracies can be measured; without, every label is NO_LABEL."""
        return bool(self.class_names)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of images in every split that has some."""
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
        source: 'digits', an image folder with train/ and val/, an .npz file, or 'torchvision:NAME'.
        image_size: height and width of the network's input in pixels; None for what suits the data.
        seed: decides which images go into the splits that are carved out of the training images.
        calibration_images: upper limit on the calibration split.
        root: where torchvision's data sets are, or are downloaded to.
        preset: how the network takes them; mean and deviation hold for other images too.

    Raises:
        UserError: the source is unknown, damaged or too small.
    """
    _check_request(image_size, seed, calibration_images)
    found = read_source(source, root)
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
    )


def load_unlabelled(
    folder: Path,
    image_size: int | None,
    seed: int,
    calibration_images: int = 512,
    preset: ImagePreset = IMAGENET_PRESET,
) -> Data:
    """Images without labels: those in ``folder`` and in the folders within it, whose names mean nothing.

    The seed chooses up to ``calibration_images`` of them; of the others up to 1024, or a fifth of all where fewer are
    left, are the test split, on which two networks can be compared. The other arguments are those of ``load_data``.

    Raises:
        UserError: there is no image, or one that was chosen is corrupt.
    """
    _check_request(image_size, seed, calibration_images)
    files = unlabelled_files(folder)
    total = len(files)
    test = min(_HELD_OUT_MOST, max(total - calibration_images, int(_TEST_SHARE * total)))
    counts = {"test": test, "calibration": min(calibration_images, total - test)}
    groups = stratified_split(torch.full((total,), NO_LABEL), list(counts.values()), seed)
    paths = [files[index] for group in groups[:2] for index in group.tolist()]
    pixels = FilePixels(paths, decode_all(paths))
    preprocessing = _preprocessing(None, False, str(folder), image_size, preset)

    def image_set(start: int, stop: int) -> ImageSet:
        return ImageSet(pixels, torch.arange(start, stop), torch.full((stop - start,), NO_LABEL), preprocessing)

    none = image_set(0, 0)
    notes = tuple(f"{name}: {count} of {total} images, chosen by the seed" for name, count in counts.items() if count)
    return Data(none, image_set(test, len(paths)), none, image_set(0, test), (), preprocessing, notes, str(folder))


def stratified_split(labels: Tensor, counts: Sequence[int], seed: int) -> list[Tensor]:
    """Splits images at random into disjoint groups in which every class has its share.

    Args:
        labels: int64 [N].
        counts: how many images each group gets.
        seed: the result is a function of it, ``labels`` and ``counts``.

    Returns:
        Indices (int64, ascending): one group for each count, and last what is left over. In every group the number
        of images of a class differs from its share by about one; a class of one image stays in the last group where
        that holds more than half of all.
    """
    classes = labels.numpy()
    shuffled = np.random.RandomState(seed).permutation(len(classes))  # a stream that no NumPy version changes
    position = np.empty(len(classes))  # of an image within its class, from 0 to 1
    for label in np.unique(classes):
        members = np.flatnonzero(classes[shuffled] == label)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = shuffled[np.argsort(position, kind="stable")]  # any stretch of it has all classes in proportion
    return [torch.from_numpy(np.sort(group)) for group in np.split(order, np.cumsum(counts))]


def _check_request(image_size: int | None, seed: int, calibration_images: int) -> None:
    if image_size is not None and image_size < 1:
        raise UserError(f"image size {image_size} is not positive: give the height and width in pixels")
    if calibration_images < 1:
        raise UserError(f"{calibration_images} calibration images set no activation range: ask for at least 1")
    if not 0 <= seed < 1 << 32:
        raise UserError(f"seed {seed} is out of range: give one from 0 to {(1 << 32) - 1}")


def _preprocessing(
    default_size: tuple[int, int] | None, cropped: bool, source: str, image_size: int | None, preset: ImagePreset
) -> Preprocessing:
    height, width = (image_size, image_size) if image_size else default_size or (preset.size, preset.size)
    short = min(height, width)
    if not cropped and short > _SMALL:
        short = round(short * preset.short_side / preset.size)
    mean, std = preset.mean, preset.std
    if source == "digits" and (mean, std) == (IMAGENET_PRESET.mean, IMAGENET_PRESET.std):
        mean, std = (0.305,) * 3, (0.376,) * 3  # their own, unless others are asked for
    return Preprocessing(height, width, mean, std, short)


def _augmentation(found: Source, source: str, preprocessing: Preprocessing) -> Augmentation:
    short = min(preprocessing.height, preprocessing.width)
    padding = math.ceil(short / (16 if source == "digits" else 8)) if short <= _SMALL else 0
    return Augmentation(padding, found.mirrors)


def _resize_once(found: Source, preprocessing: Preprocessing) -> Source:
    """Small images that are in memory, at the network's size once and for all, where they fit there."""
    parts = {name: getattr(found, name) for name in ("train", "validation", "test")}
    arrays = {name: part for name, part in parts.items() if part and isinstance(part.pixels, ArrayPixels)}
    if sum(len(part.labels) for part in arrays.values()) * 3 * preprocessing.resize**2 > MEMORY_LIMIT:
        return found
    for name, part in arrays.items():
        arrays[name] = Part(ArrayPixels(preprocessing.fit(part.pixels.images)), part.labels)
    return replace(found, **arrays)


def _split(found: Source, source: str, seed: int, calibration_images: int) -> tuple[dict[str, Tensor], list[str]]:
    """Indices of train and of the splits carved out of it into the training images, and how that was done."""
    total = len(found.train.labels)
    counts = {}
    if found.test is None:
        counts["test"] = round(_TEST_SHARE * total)
    if found.validation is None:
        counts["validation"] = int(_VALIDATION_SHARE * total)
    left = total - sum(counts.values())
    wanted = max(_CALIBRATION_LEAST, int(_CALIBRATION_SHARE * left))
    counts["calibration"] = min(calibration_images, wanted, int(_CALIBRATION_MOST * left))
    for name, count in counts.items():
        if count == 0:
            least = 4 if found.validation else math.ceil(1 / _VALIDATION_SHARE)
            raise UserError(
                f"{source} has {total} training images, too few for a {name} split: add some, {least} are needed"
            )
    groups = stratified_split(found.train.labels, list(counts.values()), seed)
    notes = [
        f"{name}: {count} of {total} images, held out of training, stratified by class"
        for name, count in counts.items()
    ]
    return dict(zip([*counts, "train"], groups, strict=True)), notes
