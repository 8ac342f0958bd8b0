"""Processes of benchmarks that share a GPU: they build side by side, and while one measures the others are stopped."""

from __future__ import annotations

import atexit
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class GpuTurns:
    """This process among those that share a GPU.

    Args:
        folder: the same one for all of them; None where this process has the GPU for itself.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            mine = folder / str(os.getpid())
            mine.touch()
            atexit.register(mine.unlink, missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other of the processes runs while the block does. It waits until none of them is in such a block."""
        if self._folder is None:
            yield
            return
        with open(self._folder / "turn", "w", encoding="utf-8") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            others = [int(file.name) for file in self._folder.iterdir() if file.name.isdigit()]
            others.remove(os.getpid())
            try:
                _send(signal.SIGSTOP, others)
                time.sleep(0.2)  # what they had given to the GPU ends
                yield
            finally:
                _send(signal.SIGCONT, others)


def _send(number: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
