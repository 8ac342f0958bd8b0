"""The images of a split, one by one or in batches.

All randomness in a training image comes from the seed in its key, never from the process that loads it or from what
was loaded before. So the batches are the same for any number of workers, and in a run that was stopped and resumed.

Layouts: N images, C channels (RGB or grey), H height, W width. Images are uint8, 0..255, until they are
normalized on the device that trains.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.base.errors import UserError
from qat.compute.processes import SINGLE_PROCESS, Processes
from qat.data.pixels import ArrayPixels, Pixels
from qat.data.preprocessing import Augmentation, Preprocessing


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[Tensor, int]]):
    """One split. A key (index, seed) gives (uint8 [C, height, width], label). ``labels``: int64 [N].

    The seed determines the augmentation; without augmentation it is ignored.
    """

    pixels: Pixels
    indices: Tensor
    labels: Tensor
    preprocessing: Preprocessing
    augmentation: Augmentation | None = None

    @property
    def augment(self) -> bool:
        """Whether images are changed at random, as only those of the train split are."""
        return self.augmentation is not None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ready(self) -> bool:
        """Whether all images are in memory and need no resampling, so that ``take`` can return whole batches."""
        size = (self.preprocessing.height, self.preprocessing.width)
        fitting = isinstance(self.pixels, ArrayPixels) and self.pixels.images.shape[-2:] == size
        return fitting and (self.augmentation is None or self.augmentation.padding > 0)

    def take(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The images of int64 ``keys`` [N, 2]: uint8 [N, C, height, width] and labels [N]. The set must be ready."""
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


def batch_count(
    images: ImageSet, batch_size: int, training: bool = False, processes: Processes = SINGLE_PROCESS
) -> int:
    """How many batches there are for all ``processes`` together. Raises UserError when there are none."""
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is not positive: it must be at least 1")
    whole, rest = divmod(len(images), batch_size)
    count = whole + (rest >= (2 * processes.world_size if training else 1))
    if count == 0:
        raise UserError(f"{len(images)} images are too few for one training batch: add images")
    return count


def batches(
    images: ImageSet,
    batch_size: int,
    seed: int | None,
    epoch: int = 0,
    start: int = 0,
    workers: int = 0,
    training: bool = False,
    processes: Processes = SINGLE_PROCESS,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in batches: (uint8 [N, C, height, width], labels int64 [N]), on the set's device, or pinned for a GPU.

    Args:
        images: the split.
        batch_size: images in a batch, for all ``processes`` together; the last batch may be smaller.
        seed: None gives the images in order; otherwise order and augmentation depend only on (seed, epoch).
        epoch: counted from 0.
        start: number of batches to skip; they are not loaded.
        workers: processes that load images; a set that is ready needs none.
        training: leave out a last batch with fewer than two images per process, on which BatchNorm cannot train.
        processes: each process gets its share of every batch; its share of a small last batch may be empty.

    Raises:
        UserError: an image is corrupt; the message names the file.
    """
    count, pins = batch_count(images, batch_size, training, processes), torch.cuda.is_available()
    keys = _keys(len(images), seed, epoch)
    wholes = (keys[i * batch_size : (i + 1) * batch_size] for i in range(start, count))
    chunks = [share for whole in wholes if len(share := whole[processes.rank :: processes.world_size])]
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
        generator=torch.Generator(),  # otherwise the loader draws from the global one, which resuming would change
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        images_NCHW, labels = batch
        yield images_NCHW, labels


def first_batches(images: ImageSet, count: int, batch_size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Up to ``count`` images in order, as ``batches`` gives them; the last batch is shortened to fit."""
    left = count
    for images_NCHW, labels in batches(images, batch_size, None):
        yield images_NCHW[:left], labels[:left]
        left -= len(labels)
        if left <= 0:
            return


def _keys(count: int, seed: int | None, epoch: int) -> Tensor:
    """(index, seed) of every image of an epoch, in order: int64 [N, 2]."""
    if seed is None:
        return torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.int64)], 1)
    random = np.random.default_rng([seed, epoch])
    return torch.from_numpy(np.stack([random.permutation(count), random.integers(1 << 32, size=count)], 1))


@dataclass(frozen=True)
class _ErrorsAsItems(Dataset[Any]):
    """Returns a UserError instead of raising it: an error raised in a worker would arrive as a page of traceback."""

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
    """These reach all processes of a terminal; only the main process decides when to stop, and ends the workers."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
