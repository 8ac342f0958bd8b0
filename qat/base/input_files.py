"""Which files a command reads when an option names one: itself, what lies beside it, what it was made from.

Standard library only; nothing is trusted: what cannot be read here is left to the command, which says so.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

Key = tuple[object, ...]
_MOST_PARENTS = 8
_LARGEST_SIDECAR = 64 * 2**20
_SPLITS = ("train", "val", "valid", "test", "images", "masks")
_LABELS = (".txt", ".yaml", ".yml", ".xml", ".csv", ".npz", ".npy")
"""How files with labels end; no command writes such a file under a name that the user chose."""


def sidecar_path(artifact: Path) -> Path:
    """``model.onnx`` -> ``model.onnx.json``."""
    return artifact.with_name(artifact.name + ".json")


def paths_named(value: Any) -> Iterator[Path]:
    """The paths in the value of an option: PATH, PATH:function, NAME=PATH, ultralytics/PATH. Only PATH may be new."""
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from paths_named(one)
    elif isinstance(value, Path):
        yield value
    elif isinstance(value, str):
        words = {value, value.rpartition(":")[0], value.partition("=")[2], value.removeprefix("ultralytics/")}
        yield from (Path(word).expanduser() for word in words if word and os.path.exists(os.path.expanduser(word)))


def files_read_with(path: Path) -> Iterator[Path]:
    """``path``, and those that exist of: sidecar, ranges, reference images, external data; and its parents' files."""
    for _ in range(_MOST_PARENTS):
        yield path
        if not path.is_file():
            return
        beside = [sidecar_path(path), path.with_name(path.name + ".data"), path.with_name(path.name + "_data")]
        beside += [path.with_suffix(".ranges.json")] if path.suffix == ".qat" else []
        sidecar = _content(sidecar_path(path))
        with suppress(KeyError, TypeError, ValueError):
            beside.append(path.with_name(os.path.basename(sidecar["details"]["reference"]["file"])))
        yield from (file for file in beside if file.is_file())
        try:
            where_it_was = path.parent / sidecar["parent"]["file"]
        except (KeyError, TypeError):
            return
        parent = where_it_was if where_it_was.is_file() else path.parent / where_it_was.name
        if not parent.is_file():
            return
        path = parent


def keys_of(path: Path) -> list[Key]:
    """What tells whether two names are one file: where it leads to, and its inode if it is there."""
    keys: list[Key] = [("path", os.path.realpath(path))]
    with suppress(OSError):
        found = path.stat()
        keys.append(("inode", found.st_dev, found.st_ino))
    return keys


def is_read_from(output: Path, folder: Path) -> bool:
    """Whether ``output`` would be read as a part of a ``folder`` of images: an image, its labels, a new class."""
    if not folder.is_dir():
        return False
    real, root = Path(os.path.realpath(output)), Path(os.path.realpath(folder))
    if not real.is_relative_to(root):
        return False
    from qat.base.image_files import is_image  # it needs Pillow

    if is_image(real.name) or (real.suffix.lower() in _LABELS and real.exists()):
        return True
    splits = [root / name for name in _SPLITS if (root / name).is_dir()]
    inside = [place for place in splits or [root] if real.is_relative_to(place)]
    return any(real.parent != place and not real.parent.exists() for place in inside)


def mentions(model: Path, output: Path) -> bool:
    """Whether the ONNX file ``model`` names ``output``, which is there: it has its external data in it."""
    if model.suffix != ".onnx" or not output.is_file():
        return False
    real, root = Path(os.path.realpath(output)), Path(os.path.realpath(model)).parent
    if not real.is_relative_to(root):
        return False
    with (
        suppress(OSError, ValueError),  # ValueError: an empty file
        open(model, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(str(real.relative_to(root)).encode()) >= 0
    return False


def _content(sidecar: Path) -> Any:
    try:
        if sidecar.stat().st_size > _LARGEST_SIDECAR or not sidecar.is_file():
            return {}
        return json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
