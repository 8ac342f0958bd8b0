"""The engine as its builder fused it: kinds of layers; every layer with precision, format, bytes, kernel and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.engine_layers import EngineLayer
from deploy.report_page.artifacts import Artifacts
from qat.base.number_format import INT8
from qat.base.text import megabytes


def view(run: Artifacts) -> dict[str, Any] | None:
    """What the page shows of it; None without an engine."""
    if run.engine is None:
        return None
    audit = run.results.get("audit")
    entries = audit["layers"] if audit else run.engine.details["layers"]
    rows = [_row(entry) for entry in entries]
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        first = {"kind": row["kind"], "precision": row["precision"], "count": 0, "microseconds": None, "bytes": 0}
        kind = kinds.setdefault((row["kind"], row["precision"]), first)
        kind["count"] += 1
        kind["bytes"] += row["bytes"]
        if row["microseconds"] is not None:
            kind["microseconds"] = (kind["microseconds"] or 0.0) + row["microseconds"]
    figures, details = run.engine.figures, run.engine.details
    summary = (
        f"{figures['layers']} layers; {figures['convolutions_int8']} of {figures['convolutions']} convolutions and "
        f"{figures['matrix_products_int8']} of {figures['matrix_products']} matrix products in {INT8.name}; "
        f"float layers that write FP32: {figures.get('layers_writing_fp32', 0)}; "
        f"weights {megabytes(figures['weights_bytes'])}, engine {megabytes(figures['engine_bytes'])}; "
        f"{details['typing']}ly typed, built in "
        f"{figures['build_seconds']:.1f} s."
    )
    notes = []
    if not details["gpu"]:
        notes.append(
            "Built ahead of time, without a GPU: types and data paths are checked, its speed was not measured."
        )
    if audit and audit.get("batch"):
        notes.append(
            f"Times at batch {audit['batch']}, mean of {audit['runs']} runs, layer by layer: their sum is more than "
            "the engine takes."
        )
    order = sorted(rows, key=lambda row: -(row["microseconds"] or 0.0)) if audit and audit.get("batch") else rows
    by_weight = sorted(kinds.values(), key=lambda kind: (-(kind["microseconds"] or 0.0), -kind["count"]))
    return {"summary": summary, "kinds": by_weight, "layers": order, "notes": notes}


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    layer, spent = EngineLayer.from_json(entry), entry.get("milliseconds")
    return {
        "nodes": " + ".join(layer.onnx_nodes) or layer.name,
        "kind": layer.kind,
        "precision": layer.product_precision,
        "format": layer.short_format,
        "bytes": layer.output_bytes,
        "microseconds": None if spent is None else 1000 * spent,
        "kernel": layer.tactic,
    }
