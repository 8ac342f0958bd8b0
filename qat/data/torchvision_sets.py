"""torchvision's classification data sets by name: which splits each has, and where its labels are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from qat.base.errors import UserError, one_line
from qat.base.text import did_you_mean
from qat.data.parts import Part, Source
from qat.data.pixels import ArrayPixels, Pixels, TorchvisionPixels, images_nchw


def _named(train: str, test: str, validation: str | None = None) -> tuple[dict[str, Any] | None, ...]:
    return {"split": train}, None if validation is None else {"split": validation}, {"split": test}


_FLAG: tuple[dict[str, Any] | None, ...] = ({"train": True}, None, {"train": False})
# Name -> the arguments that select (train, validation, test). If there is no test split with public labels, the
# validation split is used as test.
_TORCHVISION: dict[str, tuple[dict[str, Any] | None, ...]] = {
    "CIFAR10": _FLAG,
    "CIFAR100": _FLAG,
    "Country211": _named("train", "test", "valid"),
    "DTD": _named("train", "test", "val"),
    "EMNIST": ({"split": "balanced", "train": True}, None, {"split": "balanced", "train": False}),
    "FGVCAircraft": _named("train", "test", "val"),
    "FashionMNIST": _FLAG,
    "Flowers102": _named("train", "test", "val"),
    "Food101": _named("train", "test"),
    "GTSRB": _named("train", "test"),
    "ImageNet": _named("train", "val"),
    "Imagenette": _named("train", "val"),
    "KMNIST": _FLAG,
    "MNIST": _FLAG,
    "OxfordIIITPet": _named("trainval", "test"),
    "Places365": _named("train-standard", "val"),
    "RenderedSST2": _named("train", "test", "val"),
    "STL10": _named("train", "test"),
    "SVHN": _named("train", "test"),
    "StanfordCars": _named("train", "test"),
    "USPS": _FLAG,
}
# Characters and traffic signs: a mirrored image is not of the same class.
_NOT_MIRRORED = {"EMNIST", "GTSRB", "KMNIST", "MNIST", "RenderedSST2", "SVHN", "USPS"}


def torchvision_sets() -> list[str]:
    """The names of the data sets that this version of torchvision has."""
    return [name for name in _TORCHVISION if hasattr(torchvision.datasets, name)]


def read_torchvision(name: str, root: Path) -> Source:
    """The data set ``name`` in ``root``, downloaded to it if necessary. Raises UserError when it cannot be had."""
    if name not in torchvision_sets():
        raise UserError(
            f"torchvision has no classification data set {name!r} that can be read by name"
            f"{did_you_mean(name, torchvision_sets())}: give one of {', '.join(torchvision_sets())}"
        )
    datasets = [None if options is None else _open(name, root, options) for options in _TORCHVISION[name]]
    train, validation, test = (None if dataset is None else _part(dataset) for dataset in datasets)
    assert train is not None
    assert test is not None
    in_memory = isinstance(train.pixels, ArrayPixels)
    size = (train.pixels[0].shape[-2], train.pixels[0].shape[-1]) if in_memory else None
    classes = getattr(datasets[0], "classes", range(int(train.labels.max()) + 1))
    # ImageNet's class names are tuples of synonyms.
    class_names = tuple(", ".join(c) if isinstance(c, (tuple, list)) else str(c) for c in classes)
    mirrors = name not in _NOT_MIRRORED
    return Source(train, validation, test, class_names, size, cropped=in_memory, mirrors=mirrors)


def _open(name: str, root: Path, options: dict[str, Any]) -> Any:
    """The data set in ``root``, downloaded to it if necessary."""
    make = getattr(torchvision.datasets, name)
    try:
        return make(root, **options)
    except Exception as error:  # each set reports missing files in its own way
        absent = error
    if name in ("ImageNet", "StanfordCars"):  # cannot be downloaded
        raise UserError(f"{name} is not in {root} ({one_line(absent)}): put its files there by hand") from absent
    try:
        return make(root, download=True, **options)
    except Exception as error:
        raise UserError(
            f"cannot download {name} to {root} ({one_line(error)}): check the network, or put its files there by "
            f"hand as torchvision.datasets.{name} expects them"
        ) from error


def _part(dataset: Any) -> Part:
    data = getattr(dataset, "data", None)
    pixels: Pixels = (
        ArrayPixels(images_nchw(data)) if isinstance(data, (np.ndarray, Tensor)) else TorchvisionPixels(dataset)
    )
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(dataset, attribute):
            return Part(pixels, torch.as_tensor(getattr(dataset, attribute), dtype=torch.int64))
    return Part(pixels, torch.tensor([label for _, label in dataset._samples], dtype=torch.int64))
