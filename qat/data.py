"""Image data sets and their disjoint splits: train, calibration, validation, test.

Each split has one use: weights learn on train, activation ranges come from calibration, epochs are chosen on
validation, and what is reported is measured on test. Where a source lacks a split, it is carved out of the
training images: stratified by class, a function of the seed alone. Images without labels make two splits: calibration
and test.

What is random in a training image comes only from the seed in its key, never from the process that loads it or
from what was loaded before: the same batches come from any number of workers, and from a run that was stopped
and resumed.

Layouts: N images, C channels (RGB), H height, W width. Images are uint8, 0..255, until they are normalized on
the device that trains.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.artifact import UserError
from qat.pixels import MEMORY_LIMIT, ArrayPixels, FilePixels, Pixels, decode_all
from qat.preprocessing import Augmentation, Photographs, Preprocessing
from qat.ranks import ALONE, Ranks
from qat.sources import NO_LABEL, Part, Source, read_source, unlabelled_files

__all__ = ["Data", "ImageSet", "Photographs", "Preprocessing", "batch_count", "batches", "load_data"]
__all__ += ["load_unlabelled", "stratified_split"]

PHOTOGRAPHS = Photographs()
_SMALL = 64  # pixels; up to here an image is shifted in training, above it is cropped and resized

# Shares of the training images that carved-out splits get. Of what is left at least 3/4 remain for training.
_TEST_SHARE, _VALIDATION_SHARE, _CALIBRATION_SHARE, _CALIBRATION_MOST = 1 / 5, 1 / 10, 1 / 10, 1 / 4
_CALIBRATION_LEAST = 64  # images, where there are as many
_SHARE_OF_GPU = 1 / 4  # of the memory that is free
SPLITS = ("train", "calibration", "validation", "test")
_HELD_OUT_MOST = 1024  # images without labels to measure on: an agreement of 99 % is known to 0.3 points


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[Tensor, int]]):
    """One split. Its key is (index, seed); it gives (uint8 [3, height, width], label). ``labels``: int64 [N].

    The seed decides the augmentation and is ignored without one.
    """

    pixels: Pixels
    indices: Tensor
    labels: Tensor
    preprocessing: Preprocessing
    augmentation: Augmentation | None = None

    @property
    def augment(self) -> bool:
        """Whether images are changed at random: in the train split only."""
        return self.augmentation is not None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ready(self) -> bool:
        """Whether all images are in memory and need no resampling: then ``take`` gives whole batches."""
        size = (self.preprocessing.height, self.preprocessing.width)
        fitting = isinstance(self.pixels, ArrayPixels) and self.pixels.images.shape[-2:] == size
        return fitting and (self.augmentation is None or self.augmentation.padding > 0)

    def take(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Of a set that is ready, the images of int64 ``keys`` [N, 2]: uint8 [N, 3, height, width] and labels [N]."""
        assert isinstance(self.pixels, ArrayPixels)
        index, seeds = keys.to(self.labels.device, non_blocking=True).unbind(1)
        images_NCHW = self.pixels.images[self.indices[index]]
        if self.augmentation is not None:
            images_NCHW = self.augmentation.shift(images_NCHW, seeds)
        return images_NCHW, self.labels[index]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        image = self.pixels[int(self.indices[index])]
        if self.augmentation is None:
            image = self.preprocessing.fit(image)
        else:
            image = self.augmentation(image, self.preprocessing, seed)
        return image, int(self.labels[index])


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
    photographs: Photographs = PHOTOGRAPHS,
) -> Data:
    """The data set ``source`` in four disjoint splits.

    Args:
        source: 'digits', an image folder with train/ and val/, an .npz file, or 'torchvision:NAME'.
        image_size: height and width of the network's input in pixels; None for what suits the data.
        seed: decides which images go into the splits that are carved out of the training images.
        calibration_images: upper limit on the calibration split.
        root: where torchvision's data sets are, or are downloaded to.
        photographs: how the network takes them; mean and deviation hold for other images too.

    Raises:
        UserError: the source is unknown, damaged or too small.
    """
    _check_request(image_size, seed, calibration_images)
    found = read_source(source, root)
    preprocessing = _preprocessing(found.default_size, found.cropped, source, image_size, photographs)
    augmentation = _augmentation(found, source, preprocessing)
    if augmentation.padding:
        found = _resized(found, preprocessing)
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
    photographs: Photographs = PHOTOGRAPHS,
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
    preprocessing = _preprocessing(None, False, str(folder), image_size, photographs)

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


def batch_count(images: ImageSet, batch_size: int, training: bool = False, ranks: Ranks = ALONE) -> int:
    """How many batches there are for all ``ranks`` together. Raises UserError when there is none."""
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is not positive: give at least 1")
    whole, rest = divmod(len(images), batch_size)
    count = whole + (rest >= (2 * ranks.size if training else 1))
    if count == 0:
        raise UserError(f"{len(images)} images make no batch to train on: add images")
    return count


def batches(
    images: ImageSet,
    batch_size: int,
    seed: int | None,
    epoch: int = 0,
    start: int = 0,
    workers: int = 0,
    training: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in batches: (uint8 [N, 3, height, width], labels int64 [N]), where they are, or pinned for a GPU.

    Args:
        images: the split.
        batch_size: images in a batch, of all ``ranks`` together; the last one may be smaller.
        seed: None for the images in order; else order and augmentation are a function of (seed, epoch) alone.
        epoch: from 0.
        start: number of batches to skip; they are not loaded.
        workers: processes that load; a set that is ready needs none.
        training: leaves out a last batch that has one image for a process, which BatchNorm cannot train on.
        ranks: of every batch each process gets its share; of a last small one, perhaps none.

    Raises:
        UserError: an image is corrupt (the line names the file).
    """
    count, pins = batch_count(images, batch_size, training, ranks), torch.cuda.is_available()
    keys = _keys(len(images), seed, epoch)
    wholes = (keys[i * batch_size : (i + 1) * batch_size] for i in range(start, count))
    chunks = [share for whole in wholes if len(share := whole[ranks.rank :: ranks.size])]
    if images.ready:
        for chunk in chunks:
            images_NCHW, labels = images.take(chunk)
            yield (images_NCHW.pin_memory() if pins and not images_NCHW.is_cuda else images_NCHW), labels
        return
    loader: DataLoader[Any] = DataLoader(
        _ErrorsAsItems(images),
        batch_sampler=[chunk.tolist() for chunk in chunks],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pins,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # else the loader draws from the global one, and resuming changes what follows
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        images_NCHW, labels = batch
        yield images_NCHW, labels


def _keys(count: int, seed: int | None, epoch: int) -> Tensor:
    """(index, seed) of every image of an epoch, in order: int64 [N, 2]."""
    if seed is None:
        return torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.int64)], 1)
    random = np.random.default_rng([seed, epoch])
    return torch.from_numpy(np.stack([random.permutation(count), random.integers(1 << 32, size=count)], 1))


@dataclass(frozen=True)
class _ErrorsAsItems(Dataset[Any]):
    """Gives a UserError instead of raising it: one raised in a worker arrives as a page of traceback."""

    images: ImageSet

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | UserError:
        try:
            return self.images[key]
        except UserError as error:
            return UserError(str(error))


def _collate(items: list[tuple[Tensor, int] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    images, labels = [], []
    for item in items:
        if isinstance(item, UserError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images).contiguous(), torch.tensor(labels)


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches all processes of a terminal: the main one decides when to stop, and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_request(image_size: int | None, seed: int, calibration_images: int) -> None:
    if image_size is not None and image_size < 1:
        raise UserError(f"image size {image_size} is not positive: give the height and width in pixels")
    if calibration_images < 1:
        raise UserError(f"{calibration_images} calibration images set no activation range: ask for at least 1")
    if not 0 <= seed < 1 << 32:
        raise UserError(f"seed {seed} is out of range: give one from 0 to {(1 << 32) - 1}")


def _preprocessing(
    default_size: tuple[int, int] | None, cropped: bool, source: str, image_size: int | None, photographs: Photographs
) -> Preprocessing:
    height, width = (image_size, image_size) if image_size else default_size or (photographs.size, photographs.size)
    short = min(height, width)
    if not cropped and short > _SMALL:
        short = round(short * photographs.short_side / photographs.size)
    mean, std = photographs.mean, photographs.std
    if source == "digits" and (mean, std) == (PHOTOGRAPHS.mean, PHOTOGRAPHS.std):
        mean, std = (0.305,) * 3, (0.376,) * 3  # their own, unless others are asked for
    return Preprocessing(height, width, mean, std, short)


def _augmentation(found: Source, source: str, preprocessing: Preprocessing) -> Augmentation:
    short = min(preprocessing.height, preprocessing.width)
    padding = math.ceil(short / (16 if source == "digits" else 8)) if short <= _SMALL else 0
    return Augmentation(padding, found.mirrors)


def _resized(found: Source, preprocessing: Preprocessing) -> Source:
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
