"""When a run is to stop, or to save its state: between two steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_OF_ONE_INTERRUPT = 1.0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised between two steps, after the state was saved."""


class Clock:
    """Says when the next save is due."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.reset()

    def reset(self) -> None:
        """After a save."""
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether ``seconds`` have gone by since then."""
        return time.monotonic() - self.last >= self.seconds


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds Ctrl-C and SIGTERM back until the loop asks; a second Ctrl-C, seconds later, interrupts at once.

    At the same time they come twice: from the terminal or scheduler, and from torchrun, which passes them on.
    """
    seen: list[float] = []

    def note(number: int, frame: object) -> None:
        if seen and time.monotonic() - seen[0] > _SECONDS_OF_ONE_INTERRUPT:
            raise KeyboardInterrupt
        seen.append(time.monotonic())

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
