"""What is different between two runs: accuracy, speed, settings, and what became of single layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deploy.report_page import engine_view
from deploy.report_page.artifacts import Artifacts
from deploy.report_page.layers import STATES, layers_of
from deploy.report_page.verdict import speeds_of, stages_of

_SETTINGS = (
    "keep_float",
    "calibrator",
    "weight_calibrator",
    "bits",
    "seed",
    "calibration_images",
    "smoothquant",
    "adaround",
)
_SLOWER = 1.05
"""A layer whose time changed by less than this factor is not named."""


def changes(before: Artifacts, after: Artifacts) -> dict[str, Any]:
    """The rows of the table of changes, and what ``before`` is called."""
    rows = [row for row in _rows(before, after) if row["before"] != row["after"]]
    return {"other": before.name if before.name != after.name else str(before.path), "rows": rows}


def _rows(before: Artifacts, after: Artifacts) -> Iterator[dict[str, str]]:
    yield _row("accuracy", *(_stages(run) for run in (before, after)))
    yield _row("speed against FP16", *(_speeds(run) for run in (before, after)))
    old, new = (_settings(run) for run in (before, after))
    for name in old | new:
        yield _row(name, old.get(name, "–"), new.get(name, "–"))
    kinds = [_kinds(run) for run in (before, after)]
    for kind in kinds[0] | kinds[1]:
        yield _row(f"engine layers: {kind}", *(found.get(kind, "none") for found in kinds))
    known = {layer.node: layer for layer in layers_of(before)}
    for layer in layers_of(after):
        past = known.pop(layer.node, None)
        if past is None:
            yield _row(layer.node, "not there", STATES[layer.state])
            continue
        yield _row(layer.node, *(f"{STATES[one.state]} {one.precision}" for one in (past, layer)))
        if past.milliseconds and layer.milliseconds and _differ(past.milliseconds, layer.milliseconds):
            yield _row(f"{layer.node}, us", f"{1000 * past.milliseconds:.1f}", f"{1000 * layer.milliseconds:.1f}")
    for node, layer in known.items():
        yield _row(node, STATES[layer.state], "not there")


def _kinds(run: Artifacts) -> dict[str, str]:
    """Numbers of the engine's layers by kind and type, with their time where it was measured."""
    found = engine_view.view(run)
    return {
        f"{kind['kind']} {kind['precision']}": f"{kind['count']}"
        + ("" if kind["microseconds"] is None else f", {kind['microseconds']:.0f} us")
        for kind in (found["kinds"] if found else ())
    }


def _settings(run: Artifacts) -> dict[str, str]:
    """What it was made with, by the names of settings: those of each stage, and versions."""
    found: dict[str, str] = {}
    parts = {
        "": (run.checkpoint, ("model", "data", "recipes", "splits", *_SETTINGS)),
        "file ": (run.onnx, ("input", "precision", "weights", "float_type", "padded", "merged")),
        "engine ": (run.engine, ("builder", "gpu", "compute_capabilities", "profiles", "settings", "typing")),
    }
    for prefix, (sidecar, names) in parts.items():
        if sidecar is None:
            continue
        for name in names:
            if name in sidecar.details:
                found |= _leaves(f"{prefix}{name.replace('_', ' ')}", sidecar.details[name])
        found |= _leaves(f"{prefix}version of", sidecar.made_by.get("versions", {}))
    return found


def _leaves(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {name: str(value)}
    found: dict[str, str] = {}
    for key, inside in value.items():
        found |= _leaves(f"{name} {key}", inside)
    return found


def _differ(one: float, other: float) -> bool:
    return max(one, other) > _SLOWER * min(one, other)


def _row(what: str, before: str, after: str) -> dict[str, str]:
    return {"what": what, "before": before, "after": after}


def _stages(run: Artifacts) -> str:
    return ", ".join(f"{stage.label} {stage.top1:.2f} %" for stage in stages_of(run)) or "not measured"


def _speeds(run: Artifacts) -> str:
    found: Mapping[int, float] = {speed.batch: speed.factor for speed in speeds_of(run)}
    return ", ".join(f"batch {batch}: {factor:.2f} times" for batch, factor in found.items()) or "not measured"
