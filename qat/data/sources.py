"""Reads labelled image sources: digits, an image folder, an .npz file, torchvision's data sets.

Every reader checks what it can before training starts, and reports a fault in one line. qat/data/folders.py reads
image folders; qat/data/splits.py decides how the images are split, qat/data/pixels.py how they are kept.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from qat.base.array_file import DAMAGED, opened_arrays
from qat.base.errors import UserError, one_line
from qat.base.text import did_you_mean
from qat.data.folders import read_folder
from qat.data.parts import Part, Source
from qat.data.pixels import ArrayPixels, images_nchw
from qat.data.torchvision_sets import read_torchvision, torchvision_sets


def read_source(source: str, root: Path) -> Source:
    """Reads ``source``: 'digits', 'torchvision:NAME', an .npz file or an image folder.

    ``root`` is the folder in which torchvision's data sets are found, or to which they are downloaded. Raises UserError
    when the source is unknown, missing or damaged.
    """
    path = Path(source).expanduser()
    if source == "digits":
        return _read_digits()
    if source.startswith("torchvision:"):
        return read_torchvision(source.removeprefix("torchvision:"), root)
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    known = ["digits", *(f"torchvision:{name}" for name in torchvision_sets())]
    raise UserError(
        f"unknown data set {source!r}, and no such folder{did_you_mean(source, known)}: give digits, a folder of "
        "<class>/<image> (for python -m qat.calibrate any folder of images, or a set with boxes or masks), "
        "an .npz file, or torchvision:NAME with "
        f"one of {', '.join(torchvision_sets())}"
    )


# --- digits


def _read_digits() -> Source:
    from sklearn.datasets import load_digits  # slow to import, so only when needed

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], 0..16 -> 0..255
    part = Part(ArrayPixels(images_nchw(grey)), torch.as_tensor(digits.target, dtype=torch.int64))
    return Source(part, None, None, tuple("0123456789"), (32, 32), mirrors=False)


# --- .npz


def _read_npz(path: Path) -> Source:
    arrays = _npz_arrays(path)
    required = [f"{split}_{kind}" for split in ("train", "test") for kind in ("images", "labels")]
    missing = [key for key in required if key not in arrays]
    if missing:
        found = ", ".join(arrays) or "nothing"
        raise UserError(
            f"{path} does not have {', '.join(missing)} (found: {found}): save it with {', '.join(required)}"
        )
    if ("val_images" in arrays) != ("val_labels" in arrays):
        raise UserError(f"{path} has only one of val_images and val_labels: save both or neither")
    splits = [split for split in ("train", "val", "test") if f"{split}_images" in arrays]
    size = arrays["train_images"].shape[1:3]
    for split in splits:
        _check_npz_split(path, split, arrays[f"{split}_images"], arrays[f"{split}_labels"], size)
    class_names = _npz_class_names(path, arrays, splits)
    for split in splits:
        _check_label_range(path, split, arrays[f"{split}_labels"], len(class_names))
    parts = {
        split: Part(
            ArrayPixels(images_nchw(arrays[f"{split}_images"])),
            torch.as_tensor(arrays[f"{split}_labels"].astype(np.int64)),
        )
        for split in splits
    }
    return Source(
        parts["train"],
        parts.get("val"),
        parts["test"],
        class_names,
        (size[0], size[1]),
        notes=_note_of_absent(arrays["train_labels"], len(class_names)),
        all_classes="class_names" in arrays,
    )


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with opened_arrays(path) as loaded:
            if isinstance(loaded, np.ndarray):
                raise ValueError("a single array")
            return dict(loaded)
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path") from None
    except DAMAGED as error:
        raise UserError(
            f"{path} is not an .npz file, is truncated or holds Python objects ({one_line(error)}): "
            "save it again with np.savez"
        ) from error


def _check_npz_split(path: Path, split: str, images: np.ndarray, labels: np.ndarray, size: tuple[int, ...]) -> None:
    grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
    if images.dtype != np.uint8 or not grey_or_rgb or images.size == 0:
        raise UserError(
            f"{path}: {split}_images is {images.dtype} {list(images.shape)}, but must be uint8 [N, H, W, 3] or "
            "[N, H, W]: save it so"
        )
    if images.shape[1:3] != size:
        raise UserError(
            f"{path}: {split}_images are {images.shape[1]}x{images.shape[2]} pixels, but train_images are "
            f"{size[0]}x{size[1]}: resize them to one size"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: {split}_labels is {labels.dtype} {list(labels.shape)}, but must be one integer for each of the "
            f"{len(images)} images: save it so"
        )


def _npz_class_names(path: Path, arrays: dict[str, np.ndarray], splits: list[str]) -> tuple[str, ...]:
    """``class_names`` of the file; without them, numbers up to the highest label in any of ``splits``."""
    if "class_names" not in arrays:
        highest = max(int(arrays[f"{split}_labels"].max()) for split in splits)
        return tuple(str(label) for label in range(max(0, highest) + 1))
    names = arrays["class_names"]
    if names.dtype.kind != "U" or names.ndim != 1:
        raise UserError(
            f"{path}: class_names is {names.dtype} {list(names.shape)}, but must be a list of strings: save it so"
        )
    return tuple(str(name) for name in names)


def _check_label_range(path: Path, split: str, labels: np.ndarray, classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"{path}: {split}_labels range from {low} to {high}, but there are {classes} classes: "
            f"number the classes from 0 to {classes - 1}"
        )


def _note_of_absent(labels: np.ndarray, classes: int) -> tuple[str, ...]:
    """A line that counts the classes without a training image, if there are any."""
    absent = np.setdiff1d(np.arange(classes), labels)
    if not len(absent):
        return ()
    return (f"{len(absent)} of {classes} classes have no training image (class {absent[0]} is the first)",)
