"""Standard streams that may be closed, broken or full, and signals that end a run. Standard library only.

What nobody can read does not end hours of work: a command whose standard output breaks (``| head``, a full disk) goes
on in silence and says so by its exit code. With a file of data on standard output (``--json -``) every message goes to
standard error, those of native libraries too.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

_NAMES_OF_STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_OUT, _ERROR = 1, 2
_lost = False
_data: TextIO | None = None
_holders, _pending, _last = 0, False, -math.inf

SECONDS_OF_ONE_INTERRUPT = 1.0
"""Signals within this time count as one: schedulers and torchrun send several."""


class _Survivor:
    """A text stream that drops what can no longer be written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes ``text`` while the stream takes any."""
        try:
            self._stream.write(text)
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Flushes while the stream takes any."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        global _lost
        _lost = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what is still buffered, and all that follows, goes there
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def survive() -> None:
    """Makes the standard streams of this process ones that never raise; opens those that are closed.

    A closed descriptor would be taken by the next file that is opened, and messages would go into that file.
    """
    for number in (0, _OUT, _ERROR):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    if not isinstance(sys.stdout, _Survivor):
        sys.stdout = _Survivor(sys.stdout or os.fdopen(_OUT, "w", closefd=False))
    if not isinstance(sys.stderr, _Survivor):
        sys.stderr = _Survivor(sys.stderr or os.fdopen(_ERROR, "w", closefd=False))


def lost_output() -> bool:
    """Flushes the standard streams, and says whether something that was printed could not be written."""
    for stream in (_data, sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    return _lost


def is_stdout(path: Path) -> bool:
    """Whether an output means the standard output: ``-``, ``/dev/stdout``."""
    return str(path) in _NAMES_OF_STDOUT


def keep_stdout_for_data() -> None:
    """From now on only ``write_stdout`` writes to the standard output of this process; what is printed is an error."""
    global _data
    sys.stdout.flush()
    _data = _Survivor(os.fdopen(os.dup(_OUT), "w", encoding="utf-8"))  # type: ignore[assignment]
    os.dup2(sys.stderr.fileno(), _OUT)  # in a supervised child not what native code writes to


def write_stdout(text: str) -> None:
    """Writes data to the standard output."""
    stream = _data or sys.stdout
    stream.write(text)
    stream.flush()


STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a run to save and end: Ctrl-C, a scheduler's, that of a terminal which is closed."""


def heeded() -> tuple[signal.Signals, ...]:
    """Those of ``STOPPING`` that this process does not ignore: nohup makes it ignore SIGHUP."""
    return tuple(number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN)


def interrupt_on_signals() -> None:
    """Makes all of ``STOPPING`` raise KeyboardInterrupt, so that files are closed and removed as for Ctrl-C."""
    if threading.current_thread() is threading.main_thread():
        for number in heeded():
            with suppress(ValueError):
                signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _pending, _last
    if _holders:
        _pending = True
    elif time.monotonic() - _last > SECONDS_OF_ONE_INTERRUPT:
        _last = time.monotonic()
        raise KeyboardInterrupt


def was_interrupted(error: BaseException) -> bool:
    """Whether a command that ends with ``error`` does so because of a signal, which something made another error of."""
    return _last > -math.inf and not isinstance(error, KeyboardInterrupt)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Of a command, a signal that comes in this block raises KeyboardInterrupt at its end. Only for what is short."""
    global _holders, _pending
    _holders += 1
    try:
        yield
    finally:
        _holders -= 1
    if _pending and not _holders:
        _pending = False
        raise KeyboardInterrupt


def ignore_interrupts() -> None:
    """For what a command does after its work: from now on it has as good as ended."""
    global _holders
    _holders += 1
