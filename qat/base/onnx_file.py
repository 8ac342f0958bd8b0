"""What is wrong with a file that no parser takes for an ONNX model, as far as its outermost structure tells.

An ONNX file is a protobuf message (ModelProto): field after field, each a tag and a number, or a tag, a length and so
many bytes. Standard library only: deploy/ reads ONNX files without the package onnx.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

_NUMBER, _BYTES = 0, 2  # protobuf's wire types
# The fields of a ModelProto: ir_version, texts, model_version, graph, opset_import, and what newer versions have
_IR_VERSION, _GRAPH = 1, 7
_FIELDS = {_IR_VERSION: _NUMBER, 5: _NUMBER} | dict.fromkeys((2, 3, 4, 6, _GRAPH, 8, 14, 20, 25, 26), _BYTES)
_LFS_POINTER = b"version https://git-lfs"


def flaw(path: Path) -> str:
    """What is certainly wrong with the file ``path``, to be read behind its name; "" if nothing is seen from outside.

    Ask it only about a file that a parser has refused: newer versions of ONNX may have fields that are not known here.
    Raises OSError when the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return "is empty"
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return "is a pointer of Git LFS, not the model itself (git lfs pull)"
        file.seek(0)
        return _flaw_of_fields(file, size)


def _flaw_of_fields(file: BinaryIO, size: int) -> str:
    found: set[int] = set()
    try:
        while (start := file.tell()) < size:
            tag = _varint(file)
            if _FIELDS.get(tag >> 3) != tag & 7:
                return f"is damaged: no field of a model begins at byte {start}" if found else "is not an ONNX file"
            found.add(tag >> 3)
            value = _varint(file)
            if tag & 7 == _BYTES:
                file.seek(min(value, size), os.SEEK_CUR)  # perhaps beyond the end
        end = file.tell()
    except EOFError:
        end = size + 1
    except ValueError:
        return f"is damaged: the field at byte {start} has no length" if found else "is not an ONNX file"
    if end > size:
        cut = f"is truncated: it has {size} bytes, and its fields tell of {end} at least"
        return cut if _IR_VERSION in found else "is not an ONNX file"
    return "" if _GRAPH in found else "holds no network"


def _varint(file: BinaryIO) -> int:
    """A number of 7 bits a byte, the lowest first.

    Raises EOFError when the file ends in it, and ValueError when it has no end.
    """
    value = shift = 0
    while byte := file.read(1):
        if shift > 63:
            raise ValueError("more than 64 bits")
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            return value
    raise EOFError
