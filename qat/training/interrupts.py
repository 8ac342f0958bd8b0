"""Lets a run stop or save its state between two steps, never inside one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.base.streams import SECONDS_OF_ONE_INTERRUPT, heeded


class Interrupted(KeyboardInterrupt):
    """Raised between two steps for Ctrl-C, SIGTERM or SIGHUP, after the state was saved."""


def state_path(output: Path) -> Path:
    """``model.qat`` -> ``model.qat.state``: the saved state of the run that writes ``output``."""
    return output.with_name(output.name + ".state")


class Clock:
    """Tells when the next save is due."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Starts to count again; call it after a save."""
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether ``seconds`` have passed since the last ``reset``."""
        return time.monotonic() - self.last >= self.seconds


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds back Ctrl-C, SIGTERM and SIGHUP; the yielded function tells whether one came.

    A second one interrupts at once, but two within a second count as one: under torchrun each comes twice, from the
    terminal or scheduler and from torchrun, which passes it on.
    """
    seen: list[float] = []

    def note(number: int, frame: object) -> None:
        if seen and time.monotonic() - seen[0] > SECONDS_OF_ONE_INTERRUPT:
            raise KeyboardInterrupt
        seen.append(time.monotonic())

    previous = {number: signal.signal(number, note) for number in heeded()}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
