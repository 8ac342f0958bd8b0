"""Reading files that a stranger may have made: only regular ones, and no more than their reader can want.

A FIFO would be waited for without end, a device read without end. What lies behind a link counts.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from qat.base.errors import UserError

MOST_TEXT = 1 << 30
"""Bytes of a text file (JSON, YAML, lists, caches); COCO's annotations of 118,287 images have 470 million."""


def is_regular(path: Path | str) -> bool:
    """Whether there is a file of bytes: no folder, FIFO, socket or device."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; of a name that no file can have there is none."""
    try:
        return path.exists()
    except (OSError, ValueError):  # before Python 3.14 a name that is too long raises
        return False


def check_regular(path: Path) -> None:
    """Raises UserError when ``path`` exists and is neither a file of bytes nor a folder."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return  # who opens it says why
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is not a regular file (it is a FIFO, a socket or a device): give a file")


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """The content of a regular file of at most ``most`` bytes. Raises UserError when it is none, and OSError."""
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} has more than {most >> 20} MiB, which no file of its kind has: give another file")
    return content


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """As ``read_bytes``, as UTF-8 with line feeds at the ends of lines. Raises UnicodeDecodeError too."""
    return read_bytes(path, most).decode().replace("\r\n", "\n")


def read_json(path: Path, most: int = MOST_TEXT) -> Any:
    """What a JSON file holds. Raises UserError as ``read_bytes`` does, OSError, and ValueError when it is not JSON."""
    try:
        return json.loads(read_text(path, most))
    except RecursionError:
        raise ValueError("lists or tables lie too deep within each other") from None
