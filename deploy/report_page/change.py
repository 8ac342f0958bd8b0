"""What is different between two runs: accuracy, speed, settings, and what became of single layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deploy.report_page.artifacts import Artifacts
from deploy.report_page.layers import STATES, layers_of
from deploy.report_page.verdict import speeds_of, stages_of

_SETTINGS = ("calibrator", "weight_calibrator", "bits", "seed", "calibration_images", "smoothquant", "adaround")
_SLOWER = 1.05
"""A layer whose time changed by less than this factor is not named."""


def changes(before: Artifacts, after: Artifacts) -> dict[str, Any]:
    """The rows of the table of changes, and what ``before`` is called."""
    rows = [row for row in _rows(before, after) if row["before"] != row["after"]]
    return {"other": before.name if before.name != after.name else str(before.path), "rows": rows}


def _rows(before: Artifacts, after: Artifacts) -> Iterator[dict[str, str]]:
    yield _row("verdict of accuracy", *(_stages(run) for run in (before, after)))
    yield _row("speed against FP16", *(_speeds(run) for run in (before, after)))
    old, new = (run.checkpoint.details if run.checkpoint else {} for run in (before, after))
    for name in _SETTINGS:
        yield _row(name.replace("_", " "), str(old.get(name, "–")), str(new.get(name, "–")))
    builders = [run.engine.details["builder"] if run.engine else {} for run in (before, after)]
    yield _row("builder", *(" ".join(map(str, (one.get("name", "–"), one.get("version", "")))) for one in builders))
    known = {layer.label: layer for layer in layers_of(before)}
    for layer in layers_of(after):
        past = known.pop(layer.label, None)
        if past is None:
            yield _row(layer.label, "not there", STATES[layer.state])
            continue
        yield _row(layer.label, *(f"{STATES[one.state]} {one.precision}" for one in (past, layer)))
        if past.milliseconds and layer.milliseconds and _differ(past.milliseconds, layer.milliseconds):
            yield _row(f"{layer.label}, us", f"{1000 * past.milliseconds:.1f}", f"{1000 * layer.milliseconds:.1f}")
    for label, layer in known.items():
        yield _row(label, STATES[layer.state], "not there")


def _differ(one: float, other: float) -> bool:
    return max(one, other) > _SLOWER * min(one, other)


def _row(what: str, before: str, after: str) -> dict[str, str]:
    return {"what": what, "before": before, "after": after}


def _stages(run: Artifacts) -> str:
    return ", ".join(f"{stage.label} {stage.top1:.2f} %" for stage in stages_of(run)) or "not measured"


def _speeds(run: Artifacts) -> str:
    found: Mapping[int, float] = {speed.batch: speed.factor for speed in speeds_of(run)}
    return ", ".join(f"batch {batch}: {factor:.2f} times" for batch, factor in found.items()) or "not measured"
