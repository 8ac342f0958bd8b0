"""Arrays of files: no more memory than the file's size allows, no waiting for a FIFO."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qat.base.array_file import opened_arrays
from qat.base.errors import UserError
from qat.data.sources import read_source


def test_arrays_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3))
    with opened_arrays(tmp_path / "x.npy") as array:
        assert list(array) == [0, 1, 2]
    np.savez_compressed(tmp_path / "x.npz", a=np.arange(3), b=np.zeros(5))
    with opened_arrays(tmp_path / "x.npz") as arrays:
        assert {name: len(values) for name, values in arrays.items()} == {"a": 3, "b": 5}


def test_an_archive_that_swells(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("train_images.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (257 << 20,)}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(257):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 500_000
    with pytest.raises(UserError, match=r"bomb\.npz has 2\d\d,\d+ bytes and would become 269,48\d,\d+"):
        read_source(str(path), tmp_path)


def declaring(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(80)


def test_a_header_that_tells_of_a_terabyte(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(declaring((1 << 17, 1 << 20)))
    with pytest.raises(ValueError, match="its header tells of 1099511627776 bytes"), opened_arrays(path):
        pass
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("train_images.npy", declaring((1 << 17, 1 << 20)))
    with pytest.raises(
        UserError, match=r"x\.npz is not an \.npz file, is truncated .*its header tells of 1099511627776"
    ):
        read_source(str(tmp_path / "x.npz"), tmp_path)


@pytest.mark.parametrize("header", [b"{'descr': '|u1', 'a': (", b"\x00" * 20, b"(" * 9000])
def test_a_header_that_is_no_literal(tmp_path: Path, header: bytes) -> None:
    """NumPy raises SyntaxError, TokenError, MemoryError."""
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match="header"), opened_arrays(tmp_path / "x.npy"):
        pass


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npz")
    for path in (tmp_path / "x.npz", Path("/dev/zero")):
        with pytest.raises(UserError, match="is not a regular file"), opened_arrays(path):
            pass
