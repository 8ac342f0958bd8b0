"""Opens NumPy's .npy and .npz files whose arrays are as large as their headers say, and not larger than they may be.

A header can declare an array of a terabyte, for which NumPy takes memory before it reads; and an .npz file is a zip
archive, in which 2 MB become 2 GB.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qat.base.errors import UserError, one_line
from qat.base.regular_file import check_regular

_UNSUSPICIOUS, _MOST_RATIO = 256 << 20, 100
"""Bytes that an archive may always become, and how many times its own size it may become beyond; photographs that NumPy
has compressed become 1.1 times as large, drawings 30 times."""


DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
"""What reading a damaged file raises; the last two of a zip archive with another compression or a password."""


@contextmanager
def opened_arrays(path: Path) -> Iterator[np.ndarray | Mapping[str, np.ndarray]]:
    """The array of an .npy file, or the arrays of an .npz file, by name, each read when it is asked for.

    Raises UserError when the archive becomes suspiciously large, or is no regular file; and what NumPy raises (OSError,
    ValueError, EOFError, BadZipFile, zlib.error), then or while the block runs: ``DAMAGED`` lists it.
    """
    check_regular(path)
    with open(path, "rb") as file:  # np.load itself leaves a damaged file open
        if zipfile.is_zipfile(file):
            _check_archive(path, file)
        else:
            file.seek(0)
            _check_header(file, os.fstat(file.fileno()).st_size)
        file.seek(0)
        loaded = np.load(file, allow_pickle=False)
        yield loaded


def _check_archive(path: Path, file: BinaryIO) -> None:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if total > max(_UNSUSPICIOUS, _MOST_RATIO * size):
            raise UserError(
                f"{path} has {size:,} bytes and would become {total:,}: save its arrays uncompressed, by np.savez"
            )
        for member in members:
            if member.filename.endswith(".npy"):
                with archive.open(member) as inside:
                    _check_header(inside, member.file_size)


def _check_header(file: Any, size: int) -> None:
    """Raises ValueError when an array has fewer bytes than its header says."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read(file)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        raise
    except Exception as error:  # the header is a Python literal, and NumPy raises what parsing that does
        raise ValueError(f"the header of an array is damaged ({one_line(error)})") from error
    if not dtype.hasobject and (wanted := math.prod(shape) * dtype.itemsize) > size:
        raise ValueError(f"an array is truncated: its header tells of {wanted} bytes, and it has fewer than {size}")
