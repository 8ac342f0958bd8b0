"""Draws how ranges are chosen, as one HTML page that needs no other file: a picture and a table for each tensor.

Three panels stand one above the other on the same axis, which is |x| for the first and the threshold for the others:
the histogram, the divergence and the squared error of every candidate. A vertical line through all of them marks what
each method chooses. The style is in qat/calibration/explain_page.html.j2. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qat.calibration.explain import Choice, Curve, Explanation

TEMPLATE = Path(__file__).with_name("explain_page.html.j2")
WIDTH, LEFT, RIGHT = 960, 66, 944  # the picture, and the ends of the axis in it
BARS, POINTS = 240, 240  # at most, about
LETTER, LABEL_GAP, LABEL_HEIGHT = 7.0, 8, 22  # mean width of a letter in labels of thresholds; between two of them
_NEAR = 12  # candidates on each side of the least cost that are all drawn
_TOP, _GAP = 50, 44  # of the first panel; between panels
_HEIGHTS = 210, 150, 150
_MOST_TICKS = 5
_DEPTH = 1e-12  # costs below this share of the greatest are drawn at it


class Span(NamedTuple):
    """The ends of an axis, in pixels or in what it shows."""

    low: float
    high: float


@dataclass(frozen=True)
class Axis:
    """A vertical axis: from ``values``, on a scale of logarithms, to ``pixels`` (``low`` is the lower end)."""

    values: Span
    pixels: Span

    def __call__(self, value: float) -> float:
        """The pixel of ``value``; values beyond an end are at it."""
        low, high = map(math.log, self.values)
        at = (math.log(min(max(value, self.values.low), self.values.high)) - low) / (high - low)
        return self.pixels.low + at * (self.pixels.high - self.pixels.low)


@dataclass(frozen=True)
class _Tick:
    at: float
    text: str


@dataclass(frozen=True)
class _Label:
    """The label of a threshold: its box, and the line that it stands for at ``line``."""

    method: str
    text: str
    tip: str
    line: float
    centre: float
    width: float


@dataclass(frozen=True)
class _Mark:
    """A point of a curve, and a text below it that starts, has its middle or ends at ``text_x``."""

    x: float
    y: float
    text: str
    text_x: float
    anchor: str


@dataclass(frozen=True)
class _Panel:
    """``path``: the outline of the bars, or the curve. ``mark``: its least cost."""

    title: str
    top: float
    bottom: float
    ticks: Sequence[_Tick]
    path: str
    mark: _Mark | None = None


@dataclass(frozen=True)
class _Picture:
    description: str
    height: float
    ticks: Sequence[_Tick]
    no_candidates: float
    labels: Sequence[_Label]
    panels: Sequence[_Panel]


def draw_explanations(explanations: Sequence[Explanation], title: str = "How ranges are chosen") -> str:
    """A page of HTML with a picture and a table for each explanation of ``explain_calibration``.

    It needs no other file and no network, and can be printed.
    """
    import jinja2

    from qat.calibration.explain import COLUMNS, cells, title_of

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        others=any(choice.method == "in use" for explanation in explanations for choice in explanation.choices),
        columns=COLUMNS,
        tensors=[
            {
                "name": title_of(explanation),
                "values": sum(explanation.counts),
                "explanation": explanation,
                "rows": [(choice.method, cells(choice)) for choice in explanation.choices],
                "first_bin": _first_bin(explanation),
                "picture": _picture(explanation),
            }
            for explanation in explanations
        ],
        width=WIDTH,
        left=LEFT,
        right=RIGHT,
        label_height=LABEL_HEIGHT,
    )


def spread(centres: Sequence[float], widths: Sequence[float], room: Span, gap: float = LABEL_GAP) -> list[float]:
    """Centres near ``centres``, which rise, for boxes of these widths that do not overlap and stay in ``room``."""
    found: list[float] = []
    left = room.low
    for centre, width in zip(centres, widths, strict=True):
        found.append(max(centre, left + width / 2))
        left = found[-1] + width / 2 + gap
    right = room.high
    for index in reversed(range(len(found))):
        found[index] = min(found[index], right - widths[index] / 2)
        right = found[index] - widths[index] / 2 - gap
    return found


def log_ticks(values: Span) -> list[float]:
    """Up to six round numbers on a scale of logarithms: powers of ten where there are two, else 1, 2 and 5 of them."""
    powers = range(math.floor(math.log10(values.low)), math.ceil(math.log10(values.high)) + 1)
    tens = [power for power in powers if values.low <= 10.0**power <= values.high]
    if len(tens) >= 2:
        return [10.0**power for power in tens if (tens[-1] - power) % math.ceil(len(tens) / _MOST_TICKS) == 0]
    fine = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    return [value for value in fine if values.low <= value <= values.high]


def linear_ticks(high: float) -> list[float]:
    """0 and up to ten further multiples of a round number, at most ``high``, which is above 0."""
    power = 10.0 ** math.floor(math.log10(high))
    step = next(step for step in (power / 10, power / 5, power / 2, power) if high / step <= 10)
    return [step * index for index in range(math.floor(high / step * (1 + 1e-9)) + 1)]


def points_of(curve: Curve) -> list[tuple[float, float | None]]:
    """Threshold and cost at some hundred candidates, among them all near the least cost; None: it cannot be chosen."""
    last = len(curve.cost) - 1
    every = max(1, math.ceil(last / POINTS))
    near = range(max(0, curve.best - _NEAR), min(last, curve.best + _NEAR) + 1)
    chosen = sorted({*range(0, last + 1, every), *near, last})
    return [(curve.amax[i], curve.cost[i] if math.isfinite(curve.cost[i]) else None) for i in chosen]


def _picture(explanation: Explanation) -> _Picture | None:
    """None for a tensor without values to draw."""
    kl, mse = explanation.kl, explanation.mse
    if kl is None or mse is None:
        return None
    end = max(kl.amax[-1], *(choice.amax for choice in explanation.choices))

    def x(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * value / end

    spans, top = [], _TOP
    for height in _HEIGHTS:
        spans.append(Span(top + height, top))
        top += height + _GAP
    thresholds = ", ".join(f"{choice.method} {choice.amax:.4g}" for choice in explanation.choices)
    return _Picture(
        description=(
            f"Histogram of {sum(explanation.counts)} magnitudes up to {explanation.largest:.4g}. "
            f"Thresholds: {thresholds}. "
            f"KL divergence: {_least(kl, ' nats')}. Mean squared error: {_least(mse, '')}."
        ),
        height=spans[-1].low + 44,
        ticks=[_Tick(x(value), f"{value:.6g}") for value in linear_ticks(end)],
        no_candidates=x(kl.amax[0]),
        labels=_labels(explanation, x),
        panels=[
            _histogram(explanation, x, spans[0]),
            _curve("KL divergence when the threshold is here, in nats", kl, " nats", x, spans[1]),
            _curve("mean squared error when the threshold is here, in squared units of x", mse, "", x, spans[2]),
        ],
    )


def _labels(explanation: Explanation, x: Callable[[float], float]) -> list[_Label]:
    """Labels of the thresholds in one row, in the order of the thresholds."""
    choices = sorted(explanation.choices, key=lambda choice: choice.amax)
    texts = [f"{choice.method} {choice.amax:.4g}" for choice in choices]
    lines = [x(choice.amax) for choice in choices]
    widths = [LETTER * len(text) + 14 for text in texts]
    return [
        _Label(choice.method, text, "; ".join(_told(choice)), line, centre, width)
        for choice, text, line, centre, width in zip(
            choices, texts, lines, spread(lines, widths, Span(LEFT, RIGHT)), widths, strict=True
        )
    ]


def _told(choice: Choice) -> list[str]:
    quality = "" if choice.sqnr_db is None else f", SQNR {choice.sqnr_db:.1f} dB"
    return [f"{choice.method}: amax {choice.amax:.5g}", f"clips {choice.clipped:.4f} % of the values{quality}"]


def _histogram(explanation: Explanation, x: Callable[[float], float], span: Span) -> _Panel:
    """Bars of several bins each, up to the last bin that is not empty."""
    bins = [j for j, count in enumerate(explanation.counts) if count][-1] + 1
    together = math.ceil(bins / BARS)
    width = together * explanation.limit / len(explanation.counts)
    bars = [sum(explanation.counts[j : j + together]) for j in range(0, bins, together)]
    axis = Axis(Span(0.6, 1.3 * max(bars)), span)
    path = [f"M{LEFT} {span.low}"]
    for index, count in enumerate(bars):
        end = min(x((index + 1) * width), x(explanation.largest) if index == len(bars) - 1 else RIGHT)
        path.append(f"V{axis(count) if count else span.low:.1f}H{end:.1f}")
    each = f"{together} of {len(explanation.counts)} bins each" if together > 1 else "one bin each"
    return _Panel(
        f"number of values |x|, in bars of {each}", span.high, span.low, _ticks(axis), "".join(path) + f"V{span.low}Z"
    )


def _curve(title: str, curve: Curve, unit: str, x: Callable[[float], float], span: Span) -> _Panel:
    """A curve with its least cost marked; below it there is room for the text of the mark."""
    costs = [cost for cost in curve.cost if math.isfinite(cost)]
    empty = max(costs) <= 0  # apart from rounding all are 0, which a logarithmic scale cannot show
    high = 1.0 if empty else max(costs)
    low = max(min(costs), high * _DEPTH)
    # A quarter of the height is below the least cost, a twentieth above the greatest.
    decades = max(math.log10(high / low), 0.05)
    axis = Axis(Span(low / 10 ** (decades / 3), high * 10 ** (decades / 15)), span)
    path, pen = [], "M"
    for threshold, cost in points_of(curve):
        if cost is None:
            pen = "M"
            continue
        alone = "h0" if pen == "M" else ""  # draws a dot, if nothing follows
        path.append(f"{pen}{x(threshold):.1f} {axis(max(cost, low)):.1f}{alone}")
        pen = "L"
    best = curve.amax[curve.best]
    at, text = x(best), _least(curve, unit)
    room = LETTER * len(text) / 2
    anchor, text_at = (
        ("end", RIGHT) if at + room > RIGHT else ("start", LEFT + 6) if at - room < LEFT else ("middle", at)
    )
    mark = _Mark(at, axis(max(curve.cost[curve.best], low)), text, text_at, anchor)
    return _Panel(title, span.high, span.low, [] if empty else _ticks(axis), "".join(path), mark)


def _least(curve: Curve, unit: str) -> str:
    return f"least {curve.cost[curve.best]:.4g}{unit} at {curve.amax[curve.best]:.4g}"


def _ticks(axis: Axis) -> list[_Tick]:
    return [_Tick(axis(value), _short(value)) for value in log_ticks(axis.values)]


def _short(value: float) -> str:
    """``20``, ``1e4``, ``5e-7``."""
    if 0.01 <= value < 1e4:
        return f"{value:g}"
    digits, _, power = f"{value:e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _first_bin(explanation: Explanation) -> str:
    """How many values lie in the first bin, if that is where most of them pile up, as behind a ReLU."""
    counts = explanation.counts
    if explanation.problem or counts[0] <= 2 * counts[1]:
        return ""
    share = 100 * counts[0] / sum(counts)
    edge = explanation.limit / len(counts)
    return f"{share:.1f} % of the values lie in the first of {len(counts)} bins, below {edge:.3g}."
