"""Runs a command in a child process, so that a crash of native code becomes one line about it.

TensorRT, ONNX Runtime and the parsers of ONNX and images are native code: what they do wrong with a hostile file ends
the process. So a command that reads such files forks right behind its command line, before anything heavy is imported.
Nothing then crosses between the processes but the exit code: progress, calibrators, caches and searches work as they do
in one, CUDA is only ever initialized in the child, and many builds share one start, of some milliseconds.

The parent waits. It passes on signals that only it got (Ctrl-C on a terminal reaches both), ends as the child ends, and
takes it along when it is killed. What the child was doing stands in memory that both share (``native``, ``said``).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, NoReturn

from qat.base.errors import UserError, one_line
from qat.base.exit_codes import USER_ERROR

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_FROM_KERNEL = 0x80  # si_code of a signal that the terminal sent to the whole foreground group
_PR_SET_PDEATHSIG = 1
_NATIVE = {"onnxruntime", "tensorrt", "tensorrt_rtx"}
_TAIL = 4096  # bytes of native output that are kept for the line about a crash


class _Board:
    """Memory of parent and child: what the child is doing, what was said last, which files it has not finished."""

    _slots: ClassVar = {"doing": (0, 2048), "said": (2048, 4096), "unfinished": (4096, 1 << 16)}

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 << 16)

    def write(self, slot: str, text: str) -> None:
        start, end = self._slots[slot]
        content = text.encode(errors=self._errors(slot))[: end - start - 4]
        self._memory[start : start + 4 + len(content)] = len(content).to_bytes(4, "little") + content

    def read(self, slot: str) -> str:
        start, _ = self._slots[slot]
        length = int.from_bytes(self._memory[start : start + 4], "little")
        return self._memory[start + 4 : start + 4 + length].decode(errors=self._errors(slot))

    def _errors(self, slot: str) -> str:
        return "surrogateescape" if slot == "unfinished" else "replace"  # of paths every byte counts


_board: _Board | None = None


@contextmanager
def native(doing: str) -> Iterator[None]:
    """Notes what native code does while the block runs, such as ``TensorRT parsing model.onnx``."""
    before = _board.read("doing") if _board else ""
    if _board:
        _board.write("doing", doing)
        _board.write("said", "")
    try:
        yield
    finally:
        if _board:
            _board.write("doing", before)


def said(text: str) -> None:
    """Notes the last message of native code."""
    if _board:
        _board.write("said", text)


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Notes a file that a crash within the block would leave half-written: the parent then removes it."""
    before = _board.read("unfinished") if _board else ""
    if _board:
        _board.write("unfinished", f"{before}\0{path.absolute()}")
    try:
        yield
    finally:
        if _board:
            _board.write("unfinished", before)


def continue_in_child(command: str) -> None:
    """Forks, and returns in the child alone; the parent ends with the child's exit code, or dies of its signal.

    Call it while nothing heavy is imported and no thread runs: where native libraries are loaded already, whose threads
    would not be in the child, it does nothing. Raises UserError in the parent when the child crashed: one line that
    says what it was doing. ``command`` is named where that is not known.
    """
    global _board
    if _NATIVE & sys.modules.keys():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    _board, output, parent = _Board(), os.memfd_create("native output"), os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*_PASSED_ON, signal.SIGCHLD))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would let the child vanish without its exit code
    child = os.fork()
    if child:
        _wait(child, output, command)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # no core file
    _keep_native_output(output)


def _keep_native_output(output: int) -> None:
    """What native code writes to standard error goes to ``output``; Python's own goes on where it went.

    A C++ library that gives up writes lines there that tell a user nothing.
    """
    own = os.dup(2)
    os.dup2(output, 2)
    sys.stderr = os.fdopen(own, "w", buffering=1, encoding="utf-8", errors="backslashreplace")


def _wait(child: int, output: int, command: str) -> NoReturn:
    while True:
        received = signal.sigtimedwait((*_PASSED_ON, signal.SIGCHLD), 1.0)
        if received and received.si_signo != signal.SIGCHLD and received.si_code != _FROM_KERNEL:
            with suppress(ProcessLookupError):
                os.kill(child, received.si_signo)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
    text = os.pread(output, os.fstat(output).st_size, 0).decode(errors="replace")
    if os.WIFEXITED(status):
        if os.WEXITSTATUS(status) != USER_ERROR:  # that is one line
            sys.stderr.write(text)
        sys.exit(os.WEXITSTATUS(status))
    number = os.WTERMSIG(status)
    _remove_unfinished()
    if number in _PASSED_ON:  # to end as the child did, as a shell expects it
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
    raise UserError(_crash(number, command, text[-_TAIL:]))


def _remove_unfinished() -> None:
    assert _board is not None
    for name in _board.read("unfinished").split("\0"):  # of which no path has any
        if name:
            with suppress(OSError):
                Path(name).unlink()


def _crash(number: int, command: str, output: str) -> str:
    assert _board is not None
    doing, last = _board.read("doing") or command, _board.read("said")
    name = signal.Signals(number).name
    how = f"was killed ({name}), as a system does that is short of memory" if number == signal.SIGKILL else ""
    lines = output.strip().splitlines()
    words = [
        f"{label}: {one_line(ValueError(text))}"
        for label, text in (
            ("its last message", last),
            ("it wrote", lines[-1] if lines else ""),
        )
        if text
    ]
    known = f" ({'; '.join(words)})" if words else ""
    return f"{doing} {how or f'crashed ({name})'}{known}; nothing was written: check the file, or make it again"
