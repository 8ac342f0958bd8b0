"""Folders of images with masks, the class of each pixel in an image file of the same name; 255 counts as no class.

FOLDER/images, FOLDER/masks; or both within FOLDER/train and FOLDER/val; or FOLDER/images/train, FOLDER/masks/train, ...
FOLDER/JPEGImages, FOLDER/SegmentationClass, with lists in FOLDER/ImageSets/Segmentation/train.txt: PASCAL VOC

Where there are no splits, all images are taken for either.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qat.base.errors import UserError, one_line
from qat.base.image_files import all_image_files, opened_image
from qat.base.regular_file import read_text
from qat.data.annotations import NO_CLASS, AnnotatedSet, Split, folders_of_masks, with_mask


def read(folder: Path, split: Split, most: int | None = None) -> AnnotatedSet:
    """The images of a split with their masks. Raises UserError when one has none."""
    images, masks = _folders(folder, split)
    by_name = {Path(file).relative_to(masks).with_suffix(""): file for file in all_image_files(masks)[0]}
    files = images_of(folder, split)[:most]
    missing = [file for file in files if Path(file).relative_to(images).with_suffix("") not in by_name]
    if missing:
        raise UserError(f"{len(missing)} of {len(files)} images have no mask in {masks}, first {missing[0]}: add them")
    found = tuple(with_mask(file, by_name[Path(file).relative_to(images).with_suffix("")]) for file in files)
    return AnnotatedSet(f"the {split} split of {folder}", found, ())


def images_of(folder: Path, split: Split) -> list[str]:
    """The image files of a split. Raises UserError when there are none."""
    images, _ = _folders(folder, split)
    files = all_image_files(images)[0]
    listed = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listed.is_file():
        return files
    try:
        names = set(read_text(listed).split())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {listed} ({one_line(error)}): check the file") from error
    chosen = [file for file in files if Path(file).stem in names]
    if not chosen:
        raise UserError(f"{listed} lists no image that is in {images}: correct it")
    return chosen


def read_mask(file: str) -> np.ndarray:
    """uint8 [H, W]: the class of each pixel. Raises UserError when the file is not such a mask."""
    try:
        with opened_image(file) as image:
            if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
                raise UserError(f"mask {file} has colours ({image.mode}): save the number of the class in each pixel")
            classes_HW = np.array(image).astype(np.int64)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types of exceptions
        raise UserError(f"cannot read mask {file} ({one_line(error)}): make it again") from error
    if classes_HW.min() < 0 or classes_HW.max() > NO_CLASS:
        raise UserError(f"mask {file} has classes up to {classes_HW.max()}: they must be from 0 to {NO_CLASS}")
    return classes_HW.astype(np.uint8)


def _folders(folder: Path, split: str) -> tuple[Path, Path]:
    """The folders of images and of masks of a split."""
    found = folders_of_masks(folder / split) or folders_of_masks(folder)
    if found is None:
        raise UserError(f"{folder} has no images and masks of {split}: put them into {folder / split}")
    images, masks = found
    inside = images / split, masks / split
    return inside if inside[0].is_dir() and inside[1].is_dir() else found
