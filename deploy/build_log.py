"""What a builder says while it works: its log and its progress."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deploy.cuda import OUT_OF_MEMORY
from qat.base.errors import UserError
from qat.base.supervised import said

if TYPE_CHECKING:
    import tensorrt as trt

_WEIGHTS_LINE = re.compile(r"^Total Weights Memory: (\d+) bytes", re.MULTILINE)


@dataclass
class BuildLog:
    """All messages of the parser and the builder, in order: pairs of severity (such as ``ERROR``) and text."""

    messages: list[tuple[str, str]] = field(default_factory=list)

    def texts(self, *severities: str) -> list[str]:
        """The messages of these severities, or of all if none is named, in order and without duplicates."""
        chosen = (text for severity, text in self.messages if not severities or severity in severities)
        return list(dict.fromkeys(chosen))

    def errors(self) -> list[str]:
        """Errors and internal errors."""
        return self.texts("ERROR", "INTERNAL_ERROR")

    def last_errors(self) -> str:
        """The last two errors in one line."""
        return " ".join(" ".join(self.errors()[-2:]).split())

    def weights_bytes(self) -> int | None:
        """How many bytes the engine's weights take, or None if the builder does not log it."""
        found = [match for text in self.texts() for match in _WEIGHTS_LINE.findall(text)]
        return int(found[-1]) if found else None


def raise_if_out_of_memory(log: BuildLog) -> None:
    """Raises UserError if the log has an error about GPU memory."""
    if any("out of memory" in text.lower() or "outofmemory" in text.lower() for text in log.errors()):
        raise UserError(f"TensorRT ran out of GPU memory: {OUT_OF_MEMORY}")


def recording_logger(base: type[trt.ILogger], log: BuildLog) -> trt.ILogger:
    """An ILogger that appends every message to ``log``; ``base`` is TensorRT's class ILogger."""

    class RecordingLogger(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.messages.append((severity.name, message))
            said(message)

    return RecordingLogger()


def progress_monitor(
    base: type[trt.IProgressMonitor], report: Callable[[float, str], None], go_on: Callable[[], bool]
) -> trt.IProgressMonitor:
    """An IProgressMonitor that calls ``report(fraction done, phase)``; ``base`` is TensorRT's class IProgressMonitor.

    The build is cancelled when ``go_on()`` returns False.
    """
    open_phases: dict[str, tuple[int, int]] = {}  # name -> (steps done, steps), outermost first

    def tell() -> None:
        fraction, share = 0.0, 1.0
        for done, steps in open_phases.values():
            share /= max(steps, 1)
            fraction += done * share
        report(min(fraction, 1.0), next(reversed(open_phases), ""))

    class Monitor(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            open_phases[phase_name] = (0, num_steps)
            tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in open_phases:
                open_phases[phase_name] = (step + 1, open_phases[phase_name][1])
            tell()
            return go_on()

        def phase_finish(self, phase_name: str) -> None:
            open_phases.pop(phase_name, None)

    return Monitor()
