"""The result of a run in short: as JSON for scripts, and as a table of GitHub's Markdown for a pull request."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from deploy.report_page.agreements import distance
from deploy.report_page.artifacts import Artifacts
from deploy.report_page.layers import layers_of
from deploy.report_page.task_scores import task_scores_of
from deploy.report_page.verdict import judge, speeds_of, stages_of
from qat.base.number_format import INT8


def summary(run: Artifacts) -> dict[str, Any]:
    """What the page shows on top, by its names in the code: accuracies in percent, times in milliseconds."""
    stages, speeds, layers = stages_of(run), speeds_of(run), layers_of(run)
    verdict = judge(run, stages, speeds, layers)
    return {
        "name": run.name,
        "verdict": asdict(verdict),
        "accuracy": [asdict(stage) for stage in stages],
        "scores": run.evaluation.get("scores"),
        "speed": [asdict(speed) | {"factor": speed.factor} for speed in speeds],
        "layers": [asdict(layer) for layer in layers],
        "engine": dict(run.engine.figures) if run.engine else None,
        "sha256": {kind: sidecar.sha256 for kind in run.paths if (sidecar := getattr(run, kind)) is not None},
        "missing": [asdict(one) for one in run.missing()],
    }


def markdown(run: Artifacts) -> str:
    """The same without layers, as a paragraph and a table."""
    stages, speeds = stages_of(run), speeds_of(run)
    rows = [(stage.label, _top1(stage.top1, stage.low, stage.high, stage.images)) for stage in stages]
    scores = task_scores_of(run)
    rows += scores.lines() if scores else []
    agreement = run.checkpoint.figures.get("agreement", {}) if run.checkpoint else {}
    what = f"{INT8.name} against float on {agreement.get('images')} images"
    rows += [(f"{what}, {one['tensor'] or 'output'}", distance(one)) for one in agreement.get("outputs", ())]
    for speed in speeds:
        measured = f"{speed.int8:.4f} ms, FP16 {speed.fp16:.4f} ms: {speed.factor:.2f} times as fast on {speed.gpu}"
        rows.append((f"{INT8.name}, batch {speed.batch}", measured))
    if run.engine is not None:
        figures = run.engine.figures
        for what in ("convolutions", "matrix_products"):
            rows.append((f"{what.replace('_', ' ')} in {INT8.name}", f"{figures[f'{what}_int8']} of {figures[what]}"))
    verdict = judge(run, stages, speeds, layers_of(run))
    lines = [f"**{_cell(run.name)}**: {_cell(verdict.sentence)}", "", "| what | measured |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {_cell(what)} | {_cell(found)} |" for what, found in rows), ""])


def _top1(top1: float, low: float, high: float, images: int) -> str:
    return f"{top1:.2f} % of {images} test images ({low:.1f} to {high:.1f} with 95 % confidence)"


def _cell(text: str) -> str:
    """``text`` without what Markdown would read as more than text."""
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return "".join(f"\\{letter}" if letter in "`*_[]@" else letter for letter in escaped)
