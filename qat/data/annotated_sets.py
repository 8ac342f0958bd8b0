"""Sets of images with boxes or with masks: what detectors and segmentation networks are measured on. Needs no torch.

SET.yaml          Ultralytics' description of a set: path, train, val, names; labels/*.txt beside images/
INSTANCES.json    COCO's format: images, annotations, categories; the folder of images is looked for around it
FOLDER            images/ and masks/, or JPEGImages/ and SegmentationClass/ as in PASCAL VOC: a class for each pixel

Calibration takes the training images and reads no labels; a measurement takes the validation images.
"""

from __future__ import annotations

from pathlib import Path

from qat.data.annotations import AnnotatedSet, Split, folders_of_masks


def is_annotated(source: str | Path) -> bool:
    """Whether ``source`` is one of the forms above, by its name or by the folders in it."""
    path = Path(source).expanduser()
    places = (path, path / "train", path / "val")
    return path.suffix in (".yaml", ".yml", ".json") or any(folders_of_masks(place) for place in places)


def read_annotated(source: str | Path, split: Split = "val", most: int | None = None) -> AnnotatedSet:
    """The images of a split, at most ``most`` of them, with their boxes or masks. Raises UserError for any mistake.

    COCO's format has a file for each split: all of its images are taken.
    """
    from qat.data import coco_sets, mask_folders, yolo_sets  # they need Pillow, which an engine's machine may not have

    path = Path(source).expanduser()
    if path.is_dir():
        return mask_folders.read(path, split, most)
    if path.suffix == ".json":
        return coco_sets.read(path, most)
    return yolo_sets.read(path, split, most)


def training_images(source: str | Path) -> list[str]:
    """The image files of the training split; labels are not read, and need not be there. Raises UserError."""
    from qat.data import coco_sets, mask_folders, yolo_sets  # as above

    path = Path(source).expanduser()
    if path.is_dir():
        return mask_folders.images_of(path, "train")
    if path.suffix == ".json":
        return coco_sets.images_of(path)
    return yolo_sets.images_of(path, "train")
