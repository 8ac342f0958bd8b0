"""Figures of training as it goes on: a line of JSON for each, and TensorBoard's scalars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.artifact import disk_errors

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class TrainingLog:
    """Writes ``folder``/train.jsonl and TensorBoard's event files beside it; nothing where ``folder`` is None.

    A figure stands at a step, counted from the start of its phase. What a stopped run has written behind the step that
    it is resumed from is taken out again.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / "train.jsonl" if folder else None
        self._writers: dict[str, SummaryWriter] = {}
        if folder is not None:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def begin(self, phase: str, step: int) -> None:
        """Opens a phase at ``step``: 0, or where it was stopped."""
        if self._path is None:
            return
        with disk_errors(self._path):
            lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            kept = [line for line in lines if _stands_before(json.loads(line), phase, step)]
            self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._writers[phase] = _writer(self._path.parent / phase, step)

    def add(self, phase: str, step: int, figures: dict[str, float]) -> None:
        """Figures at ``step`` of ``phase``, by name."""
        if self._path is None:
            return
        with disk_errors(self._path), open(self._path, "a", encoding="utf-8") as file:
            print(json.dumps({"phase": phase, "step": step, **figures}), file=file)
        for name, value in figures.items():
            self._writers[phase].add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what TensorBoard still holds back."""
        for writer in self._writers.values():
            writer.close()


def _stands_before(entry: dict[str, Any], phase: str, step: int) -> bool:
    order = ("float", "qat")
    return (order.index(entry["phase"]), entry["step"]) <= (order.index(phase), step) and (entry["step"] > 0)


def _writer(folder: Path, step: int) -> SummaryWriter:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
