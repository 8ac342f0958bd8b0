"""mAP or mIoU of a network that answers no classes, by who answered, as deploy.evaluate --json has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploy.report_page.artifacts import Artifacts
from deploy.who_answers import FLOAT

KEPT = 0.99
"""The share of the float network's figure that must be left, as MLPerf Inference asks of INT8 detectors."""


@dataclass(frozen=True)
class TaskScores:
    """What was measured on ``images`` images of ``source``.

    Attributes:
        names: of the figures, in percent, the one that counts first.
        rows: who answered, its figures, and the change of the first against the float network, None where unknown.
        classes: names of the classes, each with that figure of everybody; None where it does not occur.
    """

    source: str
    images: int
    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...], float | None], ...]
    classes: tuple[tuple[str, tuple[float | None, ...]], ...]

    @property
    def who(self) -> tuple[str, ...]:
        """Who answered, the judged one first."""
        return tuple(row[0] for row in self.rows)

    @property
    def judged(self) -> float:
        """The figure of the engine, or of the ONNX file in ONNX Runtime."""
        return self.rows[0][1][0]

    @property
    def in_float(self) -> float | None:
        """The figure of the float network; None where it was not asked."""
        return next((figures[0] for who, figures, _ in self.rows if who == FLOAT), None)

    @property
    def loses(self) -> bool:
        """Whether less than 99 % of the float network's figure is left."""
        return self.in_float is not None and self.judged < KEPT * self.in_float

    def lines(self) -> list[tuple[str, str]]:
        """Who answered and the figure that counts, in words; how the report is printed."""
        return [(f"{who}, {self.names[0]} on {self.images} images", f"{found[0]:.2f} %") for who, found, _ in self.rows]

    def __str__(self) -> str:
        measured = f"{self.names[0]} is {self.judged:.2f} % on {self.images} images"
        return measured if self.in_float is None else f"{measured}, against {self.in_float:.2f} % in float"


def task_scores_of(run: Artifacts) -> TaskScores | None:
    """Of the engine if it was evaluated, else of the ONNX file; None if neither was on images with boxes or masks."""
    evaluation = run.evaluation
    scores: dict[str, Any] = evaluation.get("scores", {})
    if not scores:
        return None
    names = tuple(next(iter(scores.values()))["figures"])
    base = scores.get(FLOAT, {}).get("figures", {}).get(names[0])
    rows = []
    for who, one in scores.items():
        figures = tuple(one["figures"][name] for name in names)
        rows.append((who, figures, None if base is None or who == FLOAT else figures[0] - base))
    classes = tuple(
        (name, tuple(one["by_class"].get(name) for one in scores.values()))
        for name in next(iter(scores.values()))["by_class"]
    )
    return TaskScores(evaluation["source"], evaluation["images"], names, tuple(rows), classes)
