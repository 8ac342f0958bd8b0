"""Shows how far a build and its calibration are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deploy.trt import Toolkit
from qat.base.console import progress

if TYPE_CHECKING:
    import tensorrt as trt


@contextmanager
def build_progress(toolkit: Toolkit, config: trt.IBuilderConfig) -> Iterator[Callable[[int, int], None]]:
    """Shows the progress of the build, or the seconds that it has taken if the builder does not report progress.

    Yields what calibration reports to: how many images it has used, and of how many.
    """
    start = time.monotonic()
    ended = threading.Event()
    calibrating = ""  # what the clock shows beside the seconds

    with progress("building the engine, percent", 100) as task:

        def report(fraction: float, phase: str) -> None:
            task.advance(max(0, int(100 * fraction) - task.done), phase)

        def tick() -> None:
            while not ended.wait(1.0):
                task.advance(0, f"{time.monotonic() - start:.0f} s{calibrating}")

        clock = threading.Thread(target=tick, daemon=True)
        if not toolkit.reports_progress:
            clock.start()
        try:
            with toolkit.report_progress(config, report) as raise_if_interrupted:

                def note(images: int, count: int) -> None:
                    nonlocal calibrating
                    raise_if_interrupted()
                    calibrating = f", calibrating on {images} of {count} images" if images < count else ""
                    if toolkit.reports_progress:
                        task.advance(0, calibrating.removeprefix(", "))

                yield note
        finally:
            ended.set()
