"""Writes files so that they are whole or not there, and says in one line why one cannot be written.

Standard library only.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.base.errors import UserError
from qat.base.streams import interrupts_held_back, is_stdout, write_stdout
from qat.base.supervised import unfinished

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EFBIG: "the file is too large for this file system: choose another folder",
    errno.EACCES: "no permission to write there: choose another folder",
    errno.EPERM: "no permission to write there: choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.ENOENT: "the folder does not exist and cannot be created: choose another path",
    errno.EEXIST: "a part of the path is a file, not a folder: choose another path",
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    errno.ELOOP: "a part of the path is a symbolic link that leads to itself: choose another path",
    errno.EISDIR: "that is a folder: give the name of a file",
}

_LONGEST_NAME = 255 - len("..abcd_123.part")  # bytes; while it is written the file has a longer name


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into a UserError about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(f"cannot write {path}: {_DISK_ERRORS[error.errno]}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is renamed to ``path``, otherwise it is removed.

    Of a symbolic link the file that it leads to is replaced, not the link. ``-`` is the standard output, which gets the
    text of the file. Raises UserError when the folder cannot be created or written to, or when the disk is full; when
    ``path`` is a device or anything else that is no file.
    """
    if is_stdout(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, "stdout")
            write_stdout(Path(folder, "stdout").read_text(encoding="utf-8"))
        return
    with disk_errors(path):
        path = replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = None
        try:
            with interrupts_held_back():
                handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
                temporary = Path(name)
                os.close(handle)
            with unfinished(temporary):
                yield temporary
            flush(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def replaceable(path: Path) -> Path:
    """The file to write for ``path``, which may be a symbolic link. Raises UserError or OSError when it is no file."""
    real = Path(os.path.realpath(path)) if path.is_symlink() else path
    if len(os.fsencode(real.name)) > _LONGEST_NAME:
        raise OSError(errno.ENAMETOOLONG, "the name is too long", str(path))
    if real.is_symlink():
        raise UserError(f"cannot write {path}: it is a symbolic link that leads to itself: remove it")
    try:
        mode = real.stat().st_mode
    except FileNotFoundError:
        return real
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise UserError(f"cannot write {path}: it is a {_kind_of(mode)}: give the name of a file")
    return real


def _kind_of(mode: int) -> str:
    return "pipe (FIFO)" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"


def check_writable(path: Path) -> None:
    """Raises UserError when ``path`` could not be written. Call it before hours of work, not after them."""
    if is_stdout(path):
        return
    with disk_errors(path):
        path = replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def flush(path: Path) -> None:
    """Forces a written file to the disk, so that a full disk shows as an error now."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
