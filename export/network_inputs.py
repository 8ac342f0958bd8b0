"""What a float ONNX network is fed to find ranges, and to compare it with the quantized one: images, or arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from export.reference import Sample, first_images
from qat.base.array_file import DAMAGED, opened_arrays
from qat.base.artifact import read_sidecar, sidecar_path
from qat.base.errors import UserError, one_line
from qat.data.batches import batches
from qat.data.folders import unlabelled_folder
from qat.data.preprocessing import ImagePreset, Preprocessing
from qat.data.splits import Data, load_data, load_unlabelled

_BATCH = 8
Channels = tuple[float, ...]


class NetworkInputs(ABC):
    """Batches of what a network with one input takes.

    Attributes:
        name: the name of the network's input.
        count: how many inputs there are to calibrate on.
        batch: inputs of one batch; the network's own number, if it takes a fixed one.
        preprocessing: how images become inputs; None if the inputs are not made from images.
        class_names: of the data set that the inputs are made from; () if it has no labels.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        count: int,
        preprocessing: Preprocessing | None,
        class_names: tuple[str, ...] = (),
    ) -> None:
        """``shape`` is the network's, -1 for a dynamic extent. Raises UserError when there is less than one batch."""
        self.name, self.count, self.preprocessing, self.class_names = name, count, preprocessing, class_names
        self._is_fixed = bool(shape) and shape[0] > 0
        self.batch = shape[0] if self._is_fixed else _BATCH
        if self._is_fixed and count < self.batch:
            raise UserError(f"the network takes batches of {self.batch}, there are {count} inputs: give more")

    @abstractmethod
    def calibration(self) -> Iterator[np.ndarray]:
        """Batches to find ranges on, float32, as the network takes them."""

    @abstractmethod
    def comparison(self, count: int) -> tuple[Iterator[np.ndarray], Sample | None]:
        """Batches of up to ``count`` inputs to compare two networks on, and the images that they were made from."""

    def _batches(self, arrays: np.ndarray) -> Iterator[np.ndarray]:
        """All of ``arrays``; only whole batches if the network takes a fixed number."""
        end = len(arrays) - self.batch + 1 if self._is_fixed else len(arrays)
        for start in range(0, end, self.batch):
            yield arrays[start : start + self.batch]


class ArrayInputs(NetworkInputs):
    """Arrays that the network takes as they are."""

    def __init__(self, name: str, shape: Sequence[int], arrays: np.ndarray, limit: int, source: str) -> None:
        """Takes ``arrays``, float32 [N, ...], the first ``limit`` of them to calibrate on.

        Raises UserError, which calls them ``source``, when they do not fit the network.
        """
        fits = arrays.ndim == len(shape) and all(
            extent == wanted or wanted < 0 for extent, wanted in zip(arrays.shape[1:], shape[1:], strict=True)
        )
        if not fits or arrays.dtype != np.float32 or not len(arrays):
            raise UserError(
                f"{source} holds {arrays.dtype} {list(arrays.shape)}, the network takes float32 {list(shape)}: "
                "correct it"
            )
        super().__init__(name, shape, min(limit, len(arrays)), None)
        self._arrays = arrays

    def calibration(self) -> Iterator[np.ndarray]:
        """The first of the arrays."""
        return self._batches(self._arrays[: self.count])

    def comparison(self, count: int) -> tuple[Iterator[np.ndarray], Sample | None]:
        """The first of the arrays; there are no images."""
        return self._batches(self._arrays[:count]), None


class ImageInputs(NetworkInputs):
    """Images of a data set, resized and normalized."""

    def __init__(self, name: str, shape: Sequence[int], data: Data) -> None:
        """Calibrates on the calibration split of ``data``."""
        super().__init__(name, shape, len(data.calibration), data.preprocessing, data.class_names)
        self._data, self._normalize = data, data.preprocessing.normalize

    def calibration(self) -> Iterator[np.ndarray]:
        """The calibration split."""
        for x_NCHW, _ in batches(self._data.calibration, self.batch, None):
            yield from self._batches(self._normalize(x_NCHW).numpy())

    def comparison(self, count: int) -> tuple[Iterator[np.ndarray], Sample | None]:
        """The test split."""
        images = first_images(self._data, count)
        return self._batches(self._normalize(images.images_NCHW).numpy()), images


def load_inputs(
    name: str,
    shape: Sequence[int],
    model: Path,
    data: str | np.ndarray,
    *,
    limit: int,
    mean: Channels | None,
    std: Channels | None,
    seed: int,
    data_root: Path,
) -> NetworkInputs:
    """What to feed the network ``model``, whose one input has this ``name`` and ``shape`` (-1 for a dynamic extent).

    Args:
        name: the name of the input.
        shape: the shape of the input.
        model: the network's file, whose sidecar may say how it takes images.
        data: a data set of images, a folder of images without labels, or inputs as the network takes them: an .npy
            file, or an array.
        limit: how many inputs to calibrate on, at most.
        mean: the mean of the normalization, of pixels in 0 to 1; None for the sidecar's, else the data set's.
        std: the standard deviation of the normalization, likewise.
        seed: decides which images are calibrated on.
        data_root: where torchvision's data sets are.

    Raises UserError when ``data`` cannot be read or does not fit the network.
    """
    if not isinstance(data, str) or data.endswith(".npy"):
        source, arrays = (data, _read_array(Path(data))) if isinstance(data, str) else ("the array of inputs", data)
        if mean is not None or std is not None:
            raise UserError(f"{source} holds inputs as the network takes them: leave out --mean and --std")
        return ArrayInputs(name, shape, arrays, limit, source)
    if len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3] or shape[2] < 1:
        raise UserError(
            f"the network takes {name} of shape {list(shape)}, images are [N, 3, S, S], or [N, 1, S, S] in grey: give "
            "--data an .npy file of float32 inputs as the network takes them"
        )
    preset = _preset(model, shape[1], mean, std)
    folder = unlabelled_folder(data)
    if folder is not None:
        return ImageInputs(name, shape, load_unlabelled(folder, shape[2], seed, limit, preset))
    return ImageInputs(name, shape, load_data(data, shape[2], seed, limit, data_root, preset))


def _read_array(path: Path) -> np.ndarray:
    try:
        with opened_arrays(path) as array:
            if not isinstance(array, np.ndarray):
                raise ValueError("by its content it is no .npy file")
            return array
    except DAMAGED as error:
        raise UserError(f"cannot read inputs {path} ({one_line(error)}): check the path") from error


def _preset(model: Path, channels: int, mean: Channels | None, std: Channels | None) -> ImagePreset:
    """The model's own if its sidecar says it, else ImageNet's; ``mean`` and ``std`` come before both."""
    found = ImagePreset()
    if sidecar_path(model).exists() and (stated := read_sidecar(model, "onnx").preprocessing):
        found = Preprocessing.from_json(dict(stated)).preset
    found = found.in_channels(channels)
    for option, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) != channels:
            raise UserError(
                f"{option} has {len(values)} numbers, the network takes {channels} channels: give {channels}"
            )
    return replace(found, mean=mean or found.mean, std=std or found.std)
