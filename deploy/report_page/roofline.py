"""How far each layer is from what the GPU can do: its time against the time that its bytes and operations need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.report_page.artifacts import Artifacts
from deploy.report_page.charts import Chart, Series, line_chart
from deploy.report_page.layers import Layer

_WORST_SHOWN = 10


@dataclass(frozen=True)
class Point:
    """A layer: operations for each byte, operations a second, its time and the least that it needs, in microseconds."""

    layer: Layer
    intensity: float
    per_s: float
    microseconds: float
    least: float


@dataclass(frozen=True)
class Roofline:
    """The chart, a sentence about the whole, and the layers that lose most against their limits."""

    chart: Chart
    sentence: str
    worst: tuple[Point, ...]


def roofline(run: Artifacts, layers: Sequence[Layer]) -> Roofline | None:
    """None where times, peaks or the shapes of the network are not known."""
    audit = run.results.get("audit", {})
    peaks, batch = audit.get("peaks"), audit.get("batch")
    source = run.checkpoint or run.onnx
    ops = {op["name"]: op for op in source.details.get("network", [])} if source else {}
    if not (peaks and batch and ops):
        return None
    points = [found for layer in layers if (found := _point(layer, ops, peaks, batch)) is not None]
    if len(points) < 2:
        return None
    low, high = min(point.intensity for point in points) / 2, 2 * max(point.intensity for point in points)
    roofs = [
        _roof("INT8 limit", "--green", peaks["int8_per_s"], peaks["bytes_per_s"], low, high),
        _roof("FP16 limit", "--orange", peaks["fp16_per_s"], peaks["bytes_per_s"], low, high),
    ]
    spots = [
        Series(name, colour, [(one.intensity, one.per_s / 1e12) for one in found], joined=False)
        for name, colour, found in (
            ("INT8 layers", "--blue", [one for one in points if one.layer.state == "int8"]),
            ("float layers", "--red", [one for one in points if one.layer.state != "int8"]),
        )
        if found
    ]
    chart = line_chart(
        f"Roofline at batch {batch}",
        "operations for each byte (log)",
        "TOPS (log)",
        [*roofs, *spots],
        whole=False,
        logarithmic=True,
        logarithmic_x=True,
    )
    if chart is None:
        return None
    spent, least = (sum(getattr(one, name) for one in points) for name in ("microseconds", "least"))
    limits = f"{peaks['bytes_per_s'] / 1e9:,.0f} GB/s of a copy and {peaks['int8_per_s'] / 1e12:,.0f} TOPS in INT8"
    sentence = (
        f"{len(points)} convolutions and linear layers take {spent:.1f} us. At the limits of this GPU, {limits}, they "
        f"would take {least:.1f} us. Bytes are those of inputs, weights and outputs, each moved once."
    )
    worst = sorted(points, key=lambda one: one.least - one.microseconds)
    return Roofline(chart, sentence, tuple(worst[:_WORST_SHOWN]))


def _roof(label: str, colour: str, peak: float, bandwidth: float, low: float, high: float) -> Series:
    """The limit in TOPS from ``low`` to ``high`` operations for each byte."""
    corner = peak / bandwidth
    xs = sorted({low, min(max(corner, low), high), high})
    return Series(label, colour, [(x, min(peak, x * bandwidth) / 1e12) for x in xs])


def _point(layer: Layer, ops: Mapping[str, Mapping[str, Any]], peaks: Mapping[str, float], batch: int) -> Point | None:
    op = ops.get(layer.name)
    if op is None or not op["weight"] or not op["shape"] or not layer.milliseconds or not op["inputs"]:
        return None
    given = ops[op["inputs"][0]]["shape"]
    if not given:
        return None
    # How often the weight is used: once for each pixel or row of the output, or of the input of a transposed one.
    shape = given if op["kind"] == "transposed_convolution" else op["shape"]
    rows = shape[1:-1] if op["kind"] == "linear" else shape[2:]
    operations = 2 * batch * math.prod(op["weight"]) * math.prod(rows)
    size = 1 if layer.state == "int8" else 2
    moved = size * (batch * (math.prod(given) + math.prod(op["shape"])) + math.prod(op["weight"]))
    peak = peaks["int8_per_s" if layer.state == "int8" else "fp16_per_s"]
    least = 1e6 * max(moved / peaks["bytes_per_s"], operations / peak)
    return Point(layer, operations / moved, operations / (layer.milliseconds / 1000), 1000 * layer.milliseconds, least)
