"""One run for each output: a lock beside it, which ends with the process that holds it. Standard library only.

The lock is the operating system's (flock), on the hidden file ``.NAME.lock``; what is written in it only tells people
who holds it. So a lock of a run that was killed is none, whatever the file says; the next run removes it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from qat.base.errors import UserError
from qat.base.streams import interrupts_held_back

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems that have none
_MOST_LETTERS = 300  # of a command
_SECONDS_BETWEEN_LOOKS = 0.02
_RANDOM = "[a-z0-9_]" * 8  # as tempfile.mkstemp names files
_held: set[int] = set()


@dataclass(frozen=True)
class Holder:
    """Who holds a lock; zero and empty where that cannot be read."""

    pid: int = 0
    since: str = ""
    command: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} since {self.since}: {self.command}" if self.pid else "another run"


class HeldError(Exception):
    """Another run holds the lock."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(str(holder))
        self.holder = holder


def lock_path(path: Path) -> Path:
    """``runs/model.qat`` -> ``runs/.model.qat.lock``, beside the file that ``path`` leads to."""
    real = Path(os.path.realpath(path))
    return real.with_name(f".{real.name}.lock")


@contextmanager
def locked(path: Path, command: str, patience_s: float = 0.0) -> Iterator[None]:
    """Holds the lock of the output ``path`` for ``command`` while the block runs; the folder must exist.

    It waits ``patience_s`` seconds for a holder who may have been killed: a process takes a while to end.

    Raises HeldError when another run holds it, UserError when something else has its name, and OSError when the file of
    the lock cannot be made.
    """
    name = lock_path(path)
    handle = -1
    end = time.monotonic() + patience_s
    try:
        while handle < 0:
            try:
                with interrupts_held_back():
                    handle = _acquire(name, command)
                    _held.add(handle)
            except HeldError:
                if time.monotonic() >= end:
                    raise
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        yield
    finally:
        if handle >= 0:
            with suppress(OSError):
                name.unlink()
            _held.discard(handle)
            os.close(handle)


def remove_leftovers(path: Path) -> None:
    """Removes half-written files of dead runs (``.NAME.RANDOM.part``). Only for who holds the lock of ``path``.

    RANDOM is one word of tempfile's eight letters: ``.NAME.onnx.RANDOM.part`` is of another output, NAME.onnx.
    """
    real = Path(os.path.realpath(path))
    for part in real.parent.glob(f".{glob.escape(real.name)}.{_RANDOM}.part"):
        with suppress(OSError):
            part.unlink()


def _acquire(name: Path, command: str) -> int:
    while True:
        handle = _open(name)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return handle
            holder = _read(handle)
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise HeldError(holder) from None
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(name)):
                break
        os.close(handle)  # the holder before has removed the file between the two calls
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(vars(_this_run(command))).encode())
    except OSError:
        os.close(handle)
        raise
    return handle


def _open(name: Path) -> int:
    """The file of a lock. What else is there, in a folder of a stranger, is left as it is: what leads elsewhere too."""
    try:
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise UserError(f"{name}, where a lock belongs, is no regular file: remove it") from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise UserError(f"{name}, where a lock belongs, is no regular file of its own: remove it")
    return handle


def _this_run(command: str) -> Holder:
    return Holder(os.getpid(), datetime.now(timezone.utc).isoformat(timespec="seconds"), command[:_MOST_LETTERS])


def _read(handle: int) -> Holder:
    try:
        content = json.loads(os.pread(handle, 10 * _MOST_LETTERS, 0))
        return Holder(int(content["pid"]), str(content["since"]), str(content["command"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Holder()


def _release_in_child() -> None:
    """A child that outlives this process must not keep its locks: the descriptors are copies of the same lock."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
