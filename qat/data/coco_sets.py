"""Sets of images with boxes in COCO's format: one JSON file with images, annotations and categories.

A box is left, top, width, height in pixels. Classes are the categories in the order of their numbers, which may start
anywhere and have gaps: in COCO they are 1 to 90 with ten missing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.base.errors import UserError, one_line
from qat.base.image_files import upright_size
from qat.base.regular_file import is_regular, read_json
from qat.data.annotations import AnnotatedImage, AnnotatedSet, check_inside, with_boxes

_PREFIX = "instances_"
_KEYS: Mapping[str, Mapping[str, Any]] = {
    "images": {"id": int | str, "file_name": str},
    "annotations": {"image_id": int | str, "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}
"""What each entry of these lists must have, and of which type."""


def read(path: Path, most: int | None = None) -> AnnotatedSet:
    """All images of the file, or the first ``most``, with their boxes. Raises UserError for any mistake in the set."""
    content = _content(path)
    categories = {one["id"]: one["name"] for one in content["categories"]}
    if not categories:
        raise UserError(f"{path} has no categories: name the classes there")
    ids = tuple(sorted(categories))
    place = {number: index for index, number in enumerate(ids)}
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    known = {image["id"] for image in content["images"]}
    for one in content["annotations"]:
        if one["image_id"] not in known:
            raise UserError(f"{path}: annotation {one.get('id')} is of image {one['image_id']}, which is not in images")
        if one["category_id"] not in place:
            shown = ", ".join(map(str, ids[:4])) + (", ..." if len(ids) > 4 else "")
            raise UserError(
                f"{path}: annotation {one.get('id')} has category {one['category_id']}, and categories has {shown}: "
                "correct it"
            )
        by_image[one["image_id"]].append(one)
    files = _files(path, content, most)
    images = tuple(
        _annotated(path, file, image, by_image[image["id"]], place)
        for file, image in zip(files, content["images"], strict=False)
    )
    return AnnotatedSet(str(path), images, tuple(categories[number] for number in ids), ids)


def images_of(path: Path) -> list[str]:
    """The image files that it names. Raises UserError when one is missing."""
    return _files(path, _content(path), None)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path of --data") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({one_line(error)}): check the file") from error
    for part, keys in _KEYS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(
            isinstance(one, dict) and all(isinstance(one.get(key), kind) for key, kind in keys.items())
            for one in entries
        ):
            raise UserError(
                f"{path} is not in COCO's format: {part} must be a list of entries with {', '.join(sorted(keys))}, of "
                "their types there"
            )
    if not content["images"]:
        raise UserError(f"{path} names no image: give another file")
    return dict(content)


def _files(path: Path, content: dict[str, Any], most: int | None) -> list[str]:
    names = [str(image["file_name"]) for image in content["images"]][:most]
    split, around = path.stem.removeprefix(_PREFIX), path.parent.parent
    folders = [path.parent, path.parent / "images", path.parent / split, around / split, around / "images"]
    folders += [around / "images" / split, around]
    folder = next((one for one in folders if is_regular(one / names[0])), None)
    if folder is None:
        tried = ", ".join(str(one) for one in folders[:4])
        raise UserError(f"{path}: no image {names[0]} in {tried} and others around: put the folder of images beside it")
    missing = [name for name in names if not is_regular(folder / name)]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(names)} images are not in {folder}, first {missing[0]}: add them"
        )
    return [str(folder / name) for name in names]


def _annotated(
    path: Path, file: str, image: dict[str, Any], annotations: list[dict[str, Any]], place: dict[int, int]
) -> AnnotatedImage:
    size = upright_size(file)
    stated = (image.get("width", size[0]), image.get("height", size[1]))
    if stated != size:
        raise UserError(
            f"{path}: {file} has {size[0]}x{size[1]} pixels, and the file states {stated[0]}x{stated[1]}: give the "
            "images that were annotated"
        )
    boxes, labels, crowd = [], [], []
    for one in annotations:
        where = f"{path}, annotation {one.get('id')}"
        try:
            left, top, width, height = map(float, one["bbox"])
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{where}: bbox must be left, top, width and height in pixels") from None
        box = (left, top, left + width, top + height)
        check_inside(where, box, size)
        boxes.append(box)
        labels.append(place[one["category_id"]])
        crowd.append(bool(one.get("iscrowd", 0)))
    return with_boxes(file, boxes, labels, crowd)
