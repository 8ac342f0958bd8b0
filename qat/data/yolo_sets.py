"""Sets of images with boxes as Ultralytics describes them in YAML: path, train, val, names, and labels/*.txt.

A split is a folder of images, a .txt file that lists images, or several of these. The labels of .../images/a.jpg are
.../labels/a.txt: in each line the class, from 0 on, and x and y of the centre, width and height, as shares of the
image's extents. A longer line is a polygon, of which the box around it is taken. An image without labels shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qat.base.errors import UserError, one_line
from qat.base.image_files import all_image_files, upright_size
from qat.base.regular_file import is_regular, is_there, read_text
from qat.data.annotations import AnnotatedImage, AnnotatedSet, Split, check_inside, with_boxes

_IMAGES, _LABELS = "images", "labels"
_MOST_CLASSES, _MOST_DEEP = 1_000_000, 32


def read(path: Path, split: Split, most: int | None = None) -> AnnotatedSet:
    """The images of a split with their boxes. Raises UserError for any mistake in the set."""
    content = _content(path)
    names = _names(path, content)
    files = _images(path, content, split)[:most]
    found = {file: label_file(file) for file in files}
    if not any(labels.is_file() for labels in found.values()):
        first = next(iter(found.values()))
        raise UserError(f"{path}: no image of {split} has labels, such as {first}: put them there")
    images = tuple(_labelled(file, labels, names) for file, labels in found.items())
    return AnnotatedSet(f"the {split} split of {path}", images, names)


def images_of(path: Path, split: Split) -> list[str]:
    """The image files of a split. Raises UserError when there are none."""
    return _images(path, _content(path), split)


def label_file(image: str) -> Path:
    """``set/images/a.jpg`` -> ``set/labels/a.txt``; the last folder of that name counts."""
    parts = list(Path(image).with_suffix(".txt").parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == _IMAGES:
            parts[index] = _LABELS
            break
    return Path(*parts)


def _content(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"reading {path} needs PyYAML: pip install PyYAML pycocotools") from error
    try:
        text = read_text(path)
        depth = 0
        for event in yaml.parse(text):  # event by event, so that brackets without end are not read to their end
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MOST_DEEP:
                raise ValueError(f"lists or tables lie more than {_MOST_DEEP} deep within each other")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the path of --data") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path} ({one_line(error)}): check the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not describe a set: it must have path, train, val and names")
    return content


def _names(path: Path, content: dict[str, Any]) -> tuple[str, ...]:
    names = content.get("names", content.get("nc"))
    if isinstance(names, int) and names <= _MOST_CLASSES:
        names = list(range(names))
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise UserError(f"{path}: the keys of names must be from 0 to {len(names) - 1}: number the classes so")
        names = [names[index] for index in range(len(names))]
    # aliases may make a short file a tree of any size, so nothing but plain values is turned into text
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int | float) for name in names):
        raise UserError(f"{path} names no classes: give names, a list or a table from 0 on")
    return tuple(map(str, names))


def _images(path: Path, content: dict[str, Any], split: str) -> list[str]:
    given = content.get(split)
    if not given:
        raise UserError(f"{path} has no {split}: give a folder of images, or a .txt file that lists them")
    entries = given if isinstance(given, list) else [given]
    if not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path}: {split} must be a path, or a list of paths")
    return [file for entry in entries for file in _of_entry(path, _place(path, content, str(entry)), split)]


def _place(path: Path, content: dict[str, Any], entry: str) -> Path:
    """A folder or list below the set's ``path``: absolute, or relative to the file or the current folder."""
    stated = content.get("path") or "."
    if not isinstance(stated, str):
        raise UserError(f"{path}: path must be a text, the folder of the set")
    root = Path(stated).expanduser()
    roots = [root] if root.is_absolute() else [path.parent / root, root, path.parent]
    places = [one / entry for one in roots]
    for place in places:
        if is_there(place):
            return place
    raise UserError(f"{path}: {places[0]} does not exist: correct path, train or val")


def _of_entry(path: Path, place: Path, split: str) -> Iterator[str]:
    if place.is_dir():
        yield from all_image_files(place)[0]
        return
    if place.suffix != ".txt":
        raise UserError(f"{path}: {split} is {place}, which must be a folder of images or a .txt file that lists them")
    listed = [line.strip() for line in _lines(place) if line.strip()]
    if not listed:
        raise UserError(f"{place} lists no image: write the path of one into each line")
    for line in listed:
        file = place.parent / line
        if not is_regular(file):
            raise UserError(f"{place} lists {file}, which does not exist: correct it")
        yield str(file)


def _labelled(image: str, labels: Path, names: Sequence[str]) -> AnnotatedImage:
    boxes, classes = [], []
    if labels.is_file():
        size = upright_size(image)
        for number, line in enumerate(_lines(labels), 1):
            if line.strip():
                where = f"{labels}, line {number}"
                label, shares = _parse(where, line, names)
                box = [share * extent for share, extent in zip(shares, (*size, *size), strict=True)]
                check_inside(where, box, size)
                boxes.append(box)
                classes.append(label)
    return with_boxes(image, boxes, classes, [False] * len(classes))


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({one_line(error)}): check the file") from error


def _parse(where: str, line: str, names: Sequence[str]) -> tuple[int, tuple[float, ...]]:
    """The class, and left, top, right and bottom as shares."""
    try:
        first, *values = map(float, line.split())
        label = int(first)
    except (ValueError, OverflowError):
        raise UserError(f"{where}: {line.strip()[:40]!r} must be numbers: class x y width height") from None
    if label != first or not 0 <= label < len(names):
        raise UserError(
            f"{where}: class {first:g} must be from 0 to {len(names) - 1}, as names has {len(names)}; the "
            "first class is 0"
        )
    if len(values) == 4:
        x, y, width, height = values
        return label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(values) < 6 or len(values) % 2:
        raise UserError(f"{where}: {len(values)} numbers behind the class must be 4, or the points of a polygon")
    return label, (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
