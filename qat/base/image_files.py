"""Image files: finding them in a folder, and reading one as a person sees it, or one line that says why not.

- An EXIF orientation is applied: cameras store a photograph as the sensor lay, and note how to turn it.
- Transparency is dropped. Of an image with several frames, the first is taken.
- 16 bits lose their low byte. Images of 10, 12 or 14 bits in files of 16 would become nearly black, and nothing in the
  file tells their range: they are refused.
- 32-bit integers are taken if they are in 0..255; floats if they fill 0..1, which is scaled, or 0..255.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from qat.base.errors import UserError, one_line
from qat.base.regular_file import check_regular

_KNOWN = ".apng .avif .bmp .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"
IMAGE_EXTENSIONS = tuple(known for known in _KNOWN.split() if known in Image.registered_extensions())
"""How the names of image files end, in lower case; .avif only where Pillow was built with it."""

# Of Pillow's formats those of these extensions, whatever the name says: others run a program (PostScript: Ghostscript).
_FORMATS = tuple({Image.registered_extensions()[known] for known in IMAGE_EXTENSIONS})

LETTERBOX_GREY = 114
"""The value of what stands around an image in a letterbox, as the YOLOs are trained with."""

_EXTENSIONS_SHOWN = 4
_DOUBLE, _NO_FILE = "double", "FIFO or device"  # beside extensions, which have a point
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap width and height
_QUARTER = 64  # of the 256 levels: an image that ends below is taken to have another range than its type
_SCALED, _OF_65535 = "scaled to 16 bits", "I;16B"  # .pgm files state their range, which Pillow scales to 0..65535


class _RangeError(ValueError):
    """The image can be read, but its values cannot be brought to 0..255."""


class _PixelBudget:
    """Lets threads decode at the same time while their images have no more than ``most`` pixels, or one is alone."""

    def __init__(self, most: int) -> None:
        self._free, self._most, self._changed = most, most, threading.Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_UNSUSPICIOUS, _MOST_PER_BYTE = 1 << 25, 1000  # pixels; a page in black and white, well compressed, has 700 in a byte
_decoding = _PixelBudget(1 << 26)  # decoding takes some 10 bytes for each pixel


class _TooLargeError(ValueError):
    """The image has more pixels than are read."""


# Pillow warns above its limit, and refuses above twice of it: here the limit is one.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_LIMIT = f"at most {Image.MAX_IMAGE_PIXELS or 0:,} are read, Pillow's limit: make it smaller, or remove it"


_TOO_DARK = (
    "stores 16 bits per value, but the largest is below 16384, as in images of 10, 12 or 14 bits: the image would be "
    "nearly black; scale its values to 0..65535, or save it with 8 bits"
)


def all_image_files(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """The image files in ``folder`` and its subfolders, sorted, and lines that say what was left out.

    Raises UserError when there is no image.
    """
    others: Counter[str] = Counter()
    files = image_files(folder, others)
    if not files:
        raise UserError(f"{folder} has no image{instead_of_images(others)}: add some, or give another folder")
    return files, note_of_others(others)


def image_files(folder: Path, others: Counter[str]) -> list[str]:
    """The image files in ``folder`` and its subfolders, sorted; ``others`` counts what else is there by extension."""
    return sorted(real_images(folder, others).values())


def real_images(folder: Path, others: Counter[str]) -> dict[str, str]:
    """The image files in ``folder`` and its subfolders by their real paths, links followed: each file once.

    Links to folders that were walked already, or that ``folder`` lies in, lead to nothing new and are left out.
    """
    start = os.path.realpath(folder)
    found: dict[str, str] = {}
    ahead, walked = [(str(folder), start)], {start}
    while ahead:
        inner, real = ahead.pop()
        with os.scandir(inner) as entries:
            for entry in sorted(entries, key=lambda one: (one.is_symlink(), one.name)):  # a link is the double
                target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                if entry.is_dir():
                    if target not in walked and not start.startswith(target.rstrip(os.sep) + os.sep):
                        walked.add(target)
                        ahead.append((entry.path, target))
                elif not is_image(entry.name):
                    if not entry.name.startswith("."):
                        others[Path(entry.name).suffix.lower() or "no extension"] += 1
                elif not entry.is_file() and os.path.exists(entry.path):
                    others[_NO_FILE] += 1
                elif target in found:
                    others[_DOUBLE] += 1
                else:  # a broken link too: who reads it says so
                    found[target] = entry.path
    return found


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def note_of_others(others: Counter[str]) -> tuple[str, ...]:
    """Lines about what is not taken: files that are not images, links to those that are there already."""
    others = Counter(others)
    doubles = others.pop(_DOUBLE, 0)
    notes = [f"left out, because they are there already: links to {doubles} images"] if doubles else []
    if others:
        notes.append(f"left out: {others.total()} files that are not images by their extension ({_listed(others)})")
    return tuple(notes)


def instead_of_images(others: Counter[str]) -> str:
    """What a folder without images has, and what it should have."""
    found = f"found: {_listed(others)}; " if others else ""
    return f" ({found}read: {' '.join(IMAGE_EXTENSIONS)})"


def _listed(others: Counter[str]) -> str:
    shown = [f"{count} {extension}" for extension, count in others.most_common(_EXTENSIONS_SHOWN)]
    return ", ".join(shown) + (", ..." if len(others) > _EXTENSIONS_SHOWN else "")


@contextmanager
def opened_image(path: str) -> Iterator[Image.Image]:
    """A file opened by Pillow, which has read its head.

    Raises what Pillow does, UserError for what is no regular file, and ValueError for more pixels than Pillow's own
    limit (``Image.MAX_IMAGE_PIXELS``), above which it only warns, or than a file of its size holds.
    """
    check_regular(Path(path))
    with Image.open(path, formats=_FORMATS) as image:
        width, height = image.size
        if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
            raise _TooLargeError(f"has {width}x{height} pixels, and {_LIMIT}")
        if width * height > max(_UNSUSPICIOUS, _MOST_PER_BYTE * (size := os.path.getsize(path))):
            raise _TooLargeError(f"has {width}x{height} pixels in {size:,} bytes, as no photograph has: remove it")
        yield image


def read_image(path: str) -> np.ndarray:
    """An image file as uint8 RGB, [H, W, 3].

    Raises UserError naming the file when it is corrupt or truncated, or when the range of its values is not known.
    """
    try:
        with opened_image(path) as image, _decoding.of(image.width * image.height):
            return rgb(image)
    except Exception as error:  # Pillow raises many types of exceptions
        raise _unreadable(path, error) from error


def image_size(path: str) -> tuple[int, int]:
    """(width, height) in pixels as stored, from the head of the file. Raises UserError as ``read_image`` does."""
    try:
        with opened_image(path) as image:
            width, height = image.size
            return width, height
    except Exception as error:  # Pillow raises many types of exceptions
        raise _unreadable(path, error) from error


def upright_size(path: str) -> tuple[int, int]:
    """(width, height) in pixels as a person sees it, from the head of the file. Raises UserError as ``read_image``."""
    try:
        with opened_image(path) as image:
            (width, height), turned = image.size, image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
            return (height, width) if turned else (width, height)
    except Exception as error:  # Pillow raises many types of exceptions
        raise _unreadable(path, error) from error


def rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image as uint8 [H, W, 3]. Raises ValueError when the range of its values is not known."""
    stored = _stored_as(image)  # loading forgets it
    turned = image.getexif().get(_ORIENTATION, 1) != 1
    upright = ImageOps.exif_transpose(image) if turned else image  # it would be a copy
    if upright.mode[0] in "IF":
        upright = Image.fromarray(_levels(upright, stored))
    elif upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    levels_HWC = np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))
    if ";16" in stored and upright.mode != "L" and levels_HWC.max() < _QUARTER:  # Pillow has dropped the low byte
        raise _RangeError(_TOO_DARK)
    return levels_HWC


def _stored_as(image: Image.Image) -> str:
    """Pillow's name of how a file that is not loaded yet stores its values, such as 'RGB;16B'; '' if it has none."""
    tiles: list[Any] = getattr(image, "tile", [])
    if image.format == "PPM" and image.mode == "I":
        return _OF_65535 if tiles[0][0] == "raw" else _SCALED
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _levels(image: Image.Image, stored: str) -> np.ndarray:
    """A grey image of more than 8 bits as uint8 [H, W]."""
    values_HW = np.asarray(image)
    low, high = values_HW.min(), values_HW.max()
    if image.mode.startswith("I;16") or stored in (_OF_65535, _SCALED):
        if 0 < high < _QUARTER << 8 and stored != _SCALED:
            raise _RangeError(_TOO_DARK)
        return (values_HW >> 8).astype(np.uint8)
    if image.mode == "I" and low >= 0 and high <= 255:
        return values_HW.astype(np.uint8)
    if image.mode == "F" and low >= 0 and (high <= 1 or _QUARTER <= high <= 255):
        scaled_HW: np.ndarray = np.rint(values_HW * (255 if high <= 1 else 1)).astype(np.uint8)
        return scaled_HW
    kind, taken = ("32-bit integers", "0..255 is") if image.mode == "I" else ("floats", "0..1 and 0..255 are")
    raise _RangeError(f"holds {kind} from {low:g} to {high:g}, of which only {taken} known: scale them to that")


def _unreadable(path: str, error: Exception) -> UserError:
    reason = one_line(error).replace(f" {path!r}", "")
    if isinstance(error, UserError):
        return error
    if isinstance(error, _RangeError | _TooLargeError):
        return UserError(f"{path} {reason}")
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return UserError(f"{path} has too many pixels: {_LIMIT}")
    if isinstance(error, UnidentifiedImageError):
        return UserError(f"{path} is corrupt ({reason}), or of a kind that Pillow does not read: remove or replace it")
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"cannot read {path}: {error.strerror}; check the file and its permissions")
    return UserError(f"{path} is corrupt ({reason}): remove or replace it")
