"""Reads what a weights file holds, and runs no code of it.

PyTorch's files are unpickled with weights_only=True: tensors, containers, numbers and texts. Training scripts save more
beside the weights: their options, NumPy numbers, paths, dates. For these types (``_INERT``) a placeholder is put in
place, so that not even their own constructors are called. Files with any other type are refused, and the type is named.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qat.base.errors import UserError, one_line
from qat.base.regular_file import check_regular

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")

_DTYPES = (
    *(f"{kind}{bits}" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)),
    *("Bool", "Float16", "Float32", "Float64", "Str", "Bytes"),
)
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_INERT = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "builtins.frozenset",
    "builtins.range",
    "builtins.slice",
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"pathlib.{module}{name}" for module in ("", "_local.") for name in _PATHS),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{name}DType" for name in _DTYPES),
    "numpy.dtype",
    "numpy.ndarray",
)
_LARGEST_HEADER = 100_000_000  # bytes; the format's limit
_UNSUSPICIOUS = 64 << 20  # bytes that an archive may become, however small it is
_DEEPEST = 6  # dicts within each other; nobody looks deeper for weights
_ZIP, _LFS_POINTER = b"PK\x03\x04", b"version https://git-lfs"


class _Placeholder:
    """Stands where the file has a value of an inert type; it takes that value's arguments and state, and drops them."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_weights_file(path: Path) -> Any:
    """What a .safetensors file or a file of torch.save holds; its content decides which of the two it is.

    Raises:
        UserError: no such file; it is empty, truncated or of another format; it holds Python objects of other types.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(
            f"cannot read weights file {path}: {error.strerror or one_line(error)}; check the path"
        ) from error
    if flaw := _flaw(path, start):
        raise UserError(f"weights file {path} {flaw}: get it again")
    try:
        content = load_file(path) if _is_safetensors(path, start) else _unpickle(path)
    except pickle.UnpicklingError as error:
        raise _cannot_unpickle(path, start, error) from error
    except Exception as error:  # what parsers raise on damaged bytes is not limited to a few types
        raise UserError(f"cannot read weights file {path} ({_words(error)}): {_remedy(start)}") from error
    if flaw := _multiplied(path, content):
        raise UserError(f"weights file {path} {flaw}: save the weights again by torch.save(model.state_dict(), file)")
    return content


def _multiplied(path: Path, content: object) -> str:
    """Whether what is read is more than the file has: dicts that hold one many times, tensors that repeat values."""
    size = path.stat().st_size
    most, entries, ahead = max(_UNSUSPICIOUS, 2 * size), 0, [(content, "", 0)]
    while ahead:
        one, name, depth = ahead.pop()
        if isinstance(one, Tensor) and one.numel() * one.element_size() > most:
            return f"holds {name} of {list(one.shape)}, more values than the file has"
        if isinstance(one, Mapping) and depth < _DEEPEST:
            entries += len(one)
            if entries > size:  # each entry takes a byte at least
                return f"holds dicts with more than {size:,} entries, which it repeats"
            ahead += [(value, str(key), depth + 1) for key, value in one.items()]
    return ""


def _unpickle(path: Path) -> Any:
    # a pair is what stands for a name in the file; torch types it as a class with its name
    stand_ins: list[Any] = [(_Placeholder, name) for name in _INERT]
    with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
        warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read safely is refused
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_safetensors(path: Path, start: bytes) -> bool:
    return path.suffix == ".safetensors" or start[8:10] == b'{"'


# --- what is wrong with a file


def _flaw(path: Path, start: bytes) -> str:
    """What is certainly wrong with the file, or '' if its reader shall tell."""
    if not start:
        return "is empty"
    if start.startswith(_LFS_POINTER):
        return "is a pointer of Git LFS, not the weights themselves (git lfs pull)"
    if start.startswith(_ZIP) and not _has_end_record(path):
        return "is truncated: it begins as a zip archive, and has no end record"
    if start.startswith(_ZIP):
        return _swollen(path)
    return _cut_off(path, start) if _is_safetensors(path, start) else ""


def _swollen(path: Path) -> str:
    """Whether an archive becomes larger than its file: torch.save compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return ""  # its reader tells what is wrong
    most = max(_UNSUSPICIOUS, 2 * path.stat().st_size)
    return f"would become {size:,} bytes, more than {most:,}, which no file of torch.save does" if size > most else ""


def _has_end_record(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it has one, which is damaged
        return True


def _cut_off(path: Path, start: bytes) -> str:
    """How many bytes a safetensors file lacks by its own header: its length in 8 bytes, then JSON."""
    length, size = int.from_bytes(start[:8], "little"), path.stat().st_size
    if not start[8:].startswith(b"{") or length > _LARGEST_HEADER:
        return ""
    expected = 8 + length
    if size >= expected:
        with path.open("rb") as file:
            expected += _bytes_of_tensors(file.read(expected)[8:])
    return f"is truncated: its header tells of {expected} bytes, and it has {size}" if size < expected else ""


def _bytes_of_tensors(header: bytes) -> int:
    """How many bytes follow the header of a safetensors file; 0 if it is not such a header."""
    try:
        entries = json.loads(header).items()
        return max((entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"), default=0)
    except (ValueError, AttributeError, LookupError, TypeError):
        return 0  # the reader of safetensors tells what is wrong


def _cannot_unpickle(path: Path, start: bytes, error: Exception) -> UserError:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return UserError(
            f"{path} holds Python objects ({refused[1]}); unpickling those can run any code and is refused: "
            "save only the tensors, torch.save(model.state_dict(), file)"
        )
    return UserError(f"cannot read weights file {path} ({_words(error)}): {_remedy(start)}")


def _words(error: Exception) -> str:
    """The parser's own words, without torch's advice to load the file unsafely."""
    _, _, words = str(error).partition("WeightsUnpickler error: ")
    return one_line(ValueError(words.strip().partition("\n")[0])) if words else one_line(error)


def _remedy(start: bytes) -> str:
    found = "" if start.startswith(_ZIP) else f"it begins with {start[:16]!r}; "
    return f"{found}give a .safetensors file, or save the weights again by torch.save(model.state_dict(), file)"
