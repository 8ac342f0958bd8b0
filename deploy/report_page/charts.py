"""Charts of the page: where lines, ticks and labels are. deploy/report_page/charts.svg.j2 draws them.

Coordinates are pixels of the drawing; x points right, y down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qat.base.ranges_file import ActivationDistribution, Divergence

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 80, 14, 14, 44
_MOST_TICKS = 12
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Series:
    """Points (x, y) in the units of the axes, joined by a line; ``colour`` is the name of a CSS variable."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    joined: bool = True


@dataclass(frozen=True)
class Line:
    """A series as it is drawn."""

    label: str
    colour: str
    path: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart of lines: where everything is."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    box: tuple[int, int, int, int] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    """Left, top, right, bottom of what the axes enclose."""


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    least_span: float = 0.0,
    *,
    whole: bool = True,
    logarithmic: bool = False,
    logarithmic_x: bool = False,
) -> Chart | None:
    """A chart of lines; None without two points. Points that are not finite are left out.

    ``least_span``: the axis of y covers at least so much. ``whole``: whether x are whole numbers, such as epochs.
    ``logarithmic``, ``logarithmic_x``: whether that axis is; points of 0 and less are left out then.
    """
    if logarithmic_x:
        series = [replace(one, points=[(math.log10(x), y) for x, y in one.points if x > 0]) for one in series]
    if logarithmic:
        series = [replace(one, points=[(x, math.log10(y)) for x, y in one.points if y > 0]) for one in series]
    series = [replace(one, points=[point for point in one.points if all(map(math.isfinite, point))]) for one in series]
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    if len(set(xs)) < 2:
        return None
    low_x, high_x, low, high = min(xs), max(xs), min(ys), max(ys)
    high = max(high, low + least_span, low + max(1e-9, 1e-6 * abs(low)))
    if not whole:  # points of their own do not stand on the frame
        beside, over = 0.1 * (high_x - low_x), 0.1 * (high - low)
        low_x, high_x, low, high = low_x - beside, high_x + beside, low - over, high + over

    def at_x(x: float) -> float:
        return round(LEFT + (WIDTH - RIGHT - LEFT) * (x - low_x) / (high_x - low_x), 1)

    def at_y(y: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (y - low) / (high - low), 1)

    lines = []
    for one in series:
        points = [(at_x(x), at_y(y)) for x, y in one.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in points) if points and one.joined else ""
        lines.append(Line(one.label, one.colour, path, points))
    return Chart(
        title,
        x_label,
        y_label,
        tuple(lines),
        tuple(
            (at_x(x), _power(x) if logarithmic_x else f"{x:g}")
            for x in (_whole_ticks if whole else ticks)(low_x, high_x)
        ),
        tuple((at_y(y), _power(y) if logarithmic else f"{y:g}") for y in ticks(low, high)),
    )


def _power(exponent: float) -> str:
    """Ten to a power, for people."""
    return f"{10**exponent:,.0f}" if exponent >= 1 else f"{10**exponent:.2g}"


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers between two values."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(step for step in (power / 5, power / 2, power, 2 * power, 5 * power) if (high - low) / step < 5.5)
    first = math.ceil(low / step)
    return [round(step * index, 10) for index in range(first, math.floor(high / step) + 1)]


def _whole_ticks(low: float, high: float) -> list[float]:
    """At most twelve whole numbers, evenly apart."""
    every = math.ceil((high - low + 1) / _MOST_TICKS)
    return [float(value) for value in range(math.ceil(low), math.floor(high) + 1, every)]


@dataclass(frozen=True)
class Histogram:
    """The distribution of |x| of a quantized tensor on a logarithmic axis, the thresholds of the methods, and KL.

    ``marks``: (x, method, percent clipped, whether it is in use). ``kl``: the curve as a path; '' where there is none.
    """

    title: str
    bars: str
    marks: tuple[tuple[float, str, float, bool], ...]
    kl: str
    kl_range: tuple[str, str]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    box: tuple[int, int, int, int] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


def histogram(given: ActivationDistribution, amax: float | None = None) -> Histogram | None:
    """The histogram of a tensor; None if nothing was counted. ``amax``: its present range, if training has moved it."""
    counts, limit = given.counts, given.limit
    if not any(counts) or not limit > 0:
        return None
    marks = [(choice.amax, choice.method, choice.clipped, choice.amax == given.amax) for choice in given.choices]
    if amax is not None and given.amax is not None and not math.isclose(amax, given.amax, rel_tol=1e-4):
        marks = [(x, method, clipped, False) for x, method, clipped, _ in marks]
        marks.append((amax, "trained", clipped_by(given, amax), True))
    right = 1.02 * max(given.largest or 0.0, *(x for x, *_ in marks), _SMALLEST)
    width, bottom, top = WIDTH - RIGHT - LEFT, HEIGHT - BOTTOM, TOP
    most = math.log10(max(counts) + 1)

    def at_x(x: float) -> float:
        return round(LEFT + width * min(x / right, 1.0), 1)

    step, path = limit / len(counts), [f"M{LEFT} {bottom}"]
    for index, count in enumerate(counts):
        if step * index > right:
            break
        path.append(f"V{bottom - (bottom - top) * math.log10(count + 1) / most:.0f}H{at_x(step * (index + 1))}")
    path.append(f"V{bottom}Z")
    kl, kl_range = _kl(given.kl, at_x)
    return Histogram(
        title=given.quantizer,
        bars="".join(path),
        marks=tuple((at_x(x), method, clipped, used) for x, method, clipped, used in marks),
        kl=kl,
        kl_range=kl_range,
        x_ticks=tuple((at_x(x), f"{x:g}") for x in ticks(0.0, right)),
        y_ticks=tuple(
            (round(bottom - (bottom - top) * math.log10(10**power + 1) / most, 1), f"{10**power:,}")
            for power in range(0, int(most) + 1, max(1, int(most) // 3))
        ),
    )


def clipped_by(seen: ActivationDistribution, amax: float) -> float:
    """The share of the values that calibration saw above ``amax``, in percent, to within a bin of its histogram."""
    width = seen.limit / len(seen.counts)
    first = math.ceil(amax / width - 1e-6) if width else len(seen.counts)
    return 100 * sum(seen.counts[first:]) / max(sum(seen.counts), 1)


def _kl(curve: Divergence | None, at_x: Callable[[float], float]) -> tuple[str, tuple[str, str]]:
    """The curve of the divergence on a logarithmic axis of its own, and its least and largest value."""
    known = [(x, cost) for x, cost in zip(curve.amax, curve.cost, strict=True) if cost] if curve else []
    if len(known) < 2:
        return "", ("", "")
    low, high = (math.log(pick(cost for _, cost in known)) for pick in (min, max))
    height, span = HEIGHT - BOTTOM - TOP, max(high - low, 1e-9)
    points = [f"{at_x(x)} {HEIGHT - BOTTOM - height * (math.log(cost) - low) / span:.0f}" for x, cost in known]
    return "M" + "L".join(points), (f"{math.exp(low):.3g}", f"{math.exp(high):.3g}")
