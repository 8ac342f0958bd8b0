"""Engines of one network side by side: accuracy, agreement with float, latency, size and what a build took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.calibration_inputs import calibration_inputs
from deploy.candidate_engines import CandidateEngines
from deploy.candidates import Candidate
from deploy.measure import Latency, latencies
from deploy.reference import network_input, read_reference
from deploy.runtime import Engine
from deploy.settings import CalibrationSettings
from deploy.who_answers import engine_logits
from qat.base.artifact import TensorSpec, read_sidecar, sidecar_path
from qat.base.console import table
from qat.base.errors import UserError
from qat.base.interval import interval_of_share, share_in_percent
from qat.base.text import megabytes


@dataclass(frozen=True, eq=False)
class Questions:
    """What every engine is asked.

    Attributes:
        source: where the inputs come from.
        inputs: [N, ...] as the network takes them.
        labels: int64 [N], or None if the right answers are not known.
    """

    source: str
    inputs: np.ndarray
    labels: np.ndarray | None

    @classmethod
    def of_model(cls, model: Path, data: str | None, images: int, specs: Sequence[TensorSpec]) -> Questions:
        """Those of the reference file beside an ONNX file, or ``data``, as deploy.build takes it to calibrate.

        Raises UserError when there are neither, or the network has several inputs.
        """
        if len(specs) != 1:
            raise UserError(f"{model} has {len(specs)} inputs, and only networks with one are compared here")
        sidecar = read_sidecar(model, "onnx") if sidecar_path(model).exists() else None
        if data is not None:
            found = calibration_inputs(CalibrationSettings(data=data, images=images), specs, sidecar)
            return cls(found.source, found.read(0, found.count)[specs[0].name], None)
        if sidecar is None:
            raise UserError(f"{model} has no sidecar, so nothing tells its test images: give --data")
        reference = read_reference(model, sidecar)
        labelled = bool((reference.labels[:images] >= 0).all())
        inputs = network_input(reference.images[:images], sidecar)
        return cls(reference.source, inputs, reference.labels[:images] if labelled else None)


@dataclass
class Row:
    """What was measured of one engine.

    ``answers`` are the engine's, [N, values]; ``builds`` has what each build reported, by batch size.
    """

    name: str
    answers: np.ndarray
    latency: dict[int, Latency] = field(default_factory=dict)
    builds: dict[int, dict[str, Any]] = field(default_factory=dict)

    def right(self, labels: np.ndarray) -> int:
        """How many answers are the right class."""
        return int((self.answers.argmax(1) == labels).sum())

    def agreeing(self, other: Row) -> int:
        """How many answers are the same class as those of ``other``."""
        return int((self.answers.argmax(1) == other.answers.argmax(1)).sum())

    def cosine(self, other: Row) -> float:
        """Cosine of all answers together; 1 where both are zero."""
        if np.array_equal(self.answers, other.answers):
            return 1.0
        mine, theirs = self.answers.ravel().astype(np.float64), other.answers.ravel().astype(np.float64)
        return float(mine @ theirs / max(np.linalg.norm(mine) * np.linalg.norm(theirs), 1e-300))


@dataclass(frozen=True)
class EngineTable:
    """Rows by name, the first of which is the float network that the others are compared with."""

    questions: Questions
    rows: Mapping[str, Row]

    @property
    def first(self) -> Row:
        """The float network."""
        return next(iter(self.rows.values()))

    def show(self) -> None:
        """Prints the tables."""
        count, labels = len(self.questions.inputs), self.questions.labels
        shown = []
        for row in self.rows.values():
            top1 = "no labels" if labels is None else share_in_percent(row.right(labels), count)
            agrees = f"{100 * row.agreeing(self.first) / count:.2f} %"
            shown.append((row.name, top1, agrees, f"{row.cosine(self.first):.5f}"))
        heads = ("engine", "top-1 (95 % interval)", f"same class as {self.first.name}", "cosine")
        table(f"{count} images: {self.questions.source}", heads, shown)
        batches = list(self.first.latency)
        costs = []
        for row in self.rows.values():
            times = [f"{row.latency[batch].median:.3f}" for batch in batches]
            build = row.builds[batches[-1]]
            int8 = f"{build['convolutions_int8']} of {build['convolutions']}"
            seconds = "reused" if not build["built_in_this_run"] else f"{build['seconds']:.1f}"
            costs.append((row.name, *times, seconds, megabytes(build["bytes"]), str(build["reformats"]), int8))
        times_of = [f"batch {batch}, ms" for batch in batches]
        built = ("build, s", "size", "reformats", "INT8")
        table(f"Median latency; what was built for batch {batches[-1]}", ("engine", *times_of, *built), costs)

    def to_json(self) -> dict[str, Any]:
        """As a file of results has it."""
        count, labels = len(self.questions.inputs), self.questions.labels
        rows = []
        for row in self.rows.values():
            right = None if labels is None else row.right(labels)
            interval = None if right is None else [round(100 * end, 2) for end in interval_of_share(right, count)]
            rows.append(
                {
                    "name": row.name,
                    "right": right,
                    "top1_interval_percent": interval,
                    "same_class_as_float": row.agreeing(self.first),
                    "cosine": row.cosine(self.first),
                    "latency": [latency.to_json() for latency in row.latency.values()],
                    "builds": list(row.builds.values()),
                }
            )
        return {"source": self.questions.source, "images": count, "rows": rows}


def measure_engines(
    engines: CandidateEngines,
    candidates: Sequence[Candidate],
    batches: Sequence[int],
    questions: Questions,
    runs: int = 200,
    on_batch: Callable[[EngineTable], None] = lambda _: None,
) -> EngineTable:
    """Builds the engines of all candidates, asks them, and measures their latency in turns.

    Args:
        engines: builds them.
        candidates: the float network first.
        batches: fixed batch sizes; the answers are those at the first of them.
        questions: the inputs.
        runs: how many timed inferences each has, at least.
        on_batch: called with what has been measured after each batch size.

    Raises UserError as builds do.
    """
    rows: dict[str, Row] = {}
    for batch in batches:
        plans = {candidate.name: engines.engine(candidate, batch) for candidate in candidates}
        with ExitStack() as stack:
            loaded = {
                name: stack.enter_context(Engine.from_plan(plan, engines.toolkit, contexts=1))
                for name, plan in plans.items()
            }
            for name, engine in loaded.items():
                if name not in rows:
                    rows[name] = Row(name, engine_logits(engine, questions.inputs))
            for name, latency in latencies(loaded, batch, runs).items():
                rows[name].latency[batch] = latency
        for build in engines.builds:
            rows[build["name"]].builds[build["batch"]] = build
        on_batch(EngineTable(questions, rows))
    return EngineTable(questions, rows)
