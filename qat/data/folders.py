"""Reads image folders: labelled by the folders that images are in, with or without splits, or without labels.

FOLDER/train/<class>/<image>, FOLDER/val/<class>/<image>, perhaps FOLDER/test/<class>/<image>
FOLDER/<class>/<image>          the splits are made by qat/data/splits.py
FOLDER/.../<image>              images without labels; the names of folders have no meaning
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from qat.base.errors import UserError
from qat.base.image_files import all_image_files, instead_of_images, is_image, note_of_others, real_images
from qat.data.annotated_sets import is_annotated, training_images
from qat.data.parts import Part, Source
from qat.data.pixels import FilePixels, decode_all


def read_folder(folder: Path) -> Source:
    """Images by class, in splits if the folder has them. Raises UserError when there are no classes, or other ones."""
    if not _is_split(folder):
        return _read_classes(folder)
    if not (folder / "train").is_dir() or not (folder / "val").is_dir():
        found = ", ".join(sorted(child.name for child in folder.iterdir())[:8])
        raise UserError(
            f"{folder} has only one of train/ and val/ (found: {found}): put <class>/<image> into both, or the class "
            "folders into one folder without train/ and val/, which is then split"
        )
    splits = [split for split in ("train", "val", "test") if (folder / split).is_dir()]
    others: Counter[str] = Counter()
    seen: dict[str, str] = {}
    files = {split: _class_files(folder / split, others, seen) for split in splits}
    for split in splits[1:]:
        _check_same_classes(folder, files, split)
    parts = dict(zip(splits, _parts([files[split] for split in splits]), strict=True))
    has_test = "test" in parts
    test = f"test: {folder / 'test'}" if has_test else f"test: {folder / 'val'}, because there is no test/"
    return Source(
        parts["train"],
        parts["val"] if has_test else None,
        parts["test" if has_test else "val"],
        tuple(files["train"]),
        None,
        cropped=False,
        notes=(test, *note_of_others(others)),
    )


def unlabelled_folder(source: str) -> Path | None:
    """``source`` as images without classes: a folder without train/ and val/, or a set with boxes or masks.

    None if it is anything else.
    """
    path = Path(source).expanduser()
    if source == "digits" or source.startswith("torchvision:"):
        return None
    return path if is_annotated(path) or (path.is_dir() and not _is_split(path)) else None


def unlabelled_files(source: Path) -> tuple[list[str], tuple[str, ...]]:
    """The images of what ``unlabelled_folder`` gave, and lines about them. Raises UserError when there are none.

    Of a set with boxes or masks they are those of the training split.
    """
    if not is_annotated(source):
        return all_image_files(source)
    files = training_images(source)
    return files, (f"{len(files)} training images; their boxes or masks are not read",)


def _is_split(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "val").is_dir()


def _read_classes(folder: Path) -> Source:
    """Images by class that are not in splits yet."""
    others: Counter[str] = Counter()
    files = _class_files(folder, others, {})
    if len(files) < 2:
        raise UserError(
            f"{folder} has no train/ and no val/, and only one class folder ({next(iter(files))}): put <class>/<image> "
            "into it for every class; python -m qat.calibrate also takes images without labels"
        )
    (part,) = _parts([files])
    loose = sum(is_image(child.name) for child in folder.iterdir() if child.is_file())
    notes = [f"{folder} has no train/ and no val/: its {len(files)} class folders are split here"]
    notes += [f"left out: {loose} images that are in no class folder"] if loose else []
    return Source(part, None, None, tuple(files), None, cropped=False, notes=(*notes, *note_of_others(others)))


def _parts(files: list[dict[str, list[str]]]) -> list[Part]:
    """One part for each split, whose images are kept in memory if those of all splits fit."""
    paths = [[path for of_class in by_class.values() for path in of_class] for by_class in files]
    decoded = decode_all([path for of_split in paths for path in of_split])
    parts, start = [], 0
    for by_class, of_split in zip(files, paths, strict=True):
        stop = start + len(of_split)
        pixels = FilePixels(of_split, None if decoded is None else decoded[start:stop])
        counts = torch.tensor([len(of_class) for of_class in by_class.values()])
        parts.append(Part(pixels, torch.repeat_interleave(torch.arange(len(counts)), counts)))
        start = stop
    return parts


def _class_files(split: Path, others: Counter[str], seen: dict[str, str]) -> dict[str, list[str]]:
    """Class name -> its image files, both sorted; files in subfolders of a class belong to it too.

    ``seen``: files by their real paths, of all classes and splits: links may not put one into two of them.
    """
    classes = sorted(child.name for child in split.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not classes:
        raise UserError(f"{split} has no class folders: put the images of each class into {split}/<class>/")
    files = {}
    for name in classes:
        inside: Counter[str] = Counter()
        found = real_images(split / name, inside)
        if both := found.keys() & seen.keys():
            first = min(both)
            raise UserError(
                f"{found[first]} and {seen[first]} are one file, by links, as are {len(both)} in all: classes and "
                "splits must not share images; remove the links"
            )
        seen |= found
        files[name] = sorted(found.values())
        if not files[name]:
            raise UserError(
                f"class folder {split / name} has no image{instead_of_images(inside)}: add some, or remove the folder"
            )
        others += inside
    return files


def _check_same_classes(folder: Path, files: dict[str, dict[str, list[str]]], split: str) -> None:
    for present, absent in (("train", split), (split, "train")):
        missing = [name for name in files[present] if name not in files[absent]]
        if missing:
            listed = ", ".join(repr(name) for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise UserError(
                f"{len(missing)} of the {len(files[present])} classes in {folder / present} are missing from "
                f"{folder / absent}: {listed}; add images there, or remove them here"
            )
