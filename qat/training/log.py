"""Logs the figures of training as it proceeds: lines of JSON, and scalars for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qat.base.errors import UserError
from qat.base.writing import atomic_write, disk_errors

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


_PHASES = ("float", "qat")


class TrainingLog:
    """Writes ``folder``/train.jsonl and TensorBoard's event files beside it; nothing if ``folder`` is None.

    Each figure belongs to a step, counted from the start of its phase. When a stopped run is resumed, entries after the
    step from which it is resumed are removed.
    """

    def __init__(self, folder: Path | None, *, resumed: bool = False) -> None:
        """Raises UserError when the folder has the log of another run; ``resumed``: this run continues that one."""
        self._path = folder / "train.jsonl" if folder else None
        self._writers: dict[str, SummaryWriter] = {}
        if folder is not None:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            if self._path is not None and self._path.exists() and not resumed:
                raise UserError(
                    f"{self._path} is the log of another run: give --log-folder another folder, or delete this one"
                )

    def begin(self, phase: str, step: int) -> None:
        """Starts a phase at ``step``: 0, or where it was stopped."""
        if self._path is None:
            return
        with disk_errors(self._path):
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _stands_before(line, phase, step)]
        with atomic_write(self._path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._writers[phase] = _writer(self._path.parent / phase, step)

    def add(self, phase: str, step: int, figures: dict[str, float]) -> None:
        """Adds figures, by name, at ``step`` of ``phase``."""
        if self._path is None:
            return
        with disk_errors(self._path), open(self._path, "a", encoding="utf-8") as file:
            print(json.dumps({"phase": phase, "step": step, **figures}), file=file)
        for name, value in figures.items():
            self._writers[phase].add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what TensorBoard's writers still hold in memory."""
        for writer in self._writers.values():
            writer.close()


def _stands_before(line: str, phase: str, step: int) -> bool:
    """Whether ``line`` is complete and belongs to a step up to ``step`` of ``phase``."""
    try:
        entry = json.loads(line)
        return (_PHASES.index(entry["phase"]), entry["step"]) <= (_PHASES.index(phase), step)
    except (ValueError, KeyError, TypeError):  # a line cut off when the run was killed
        return False


def _writer(folder: Path, step: int) -> SummaryWriter:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
