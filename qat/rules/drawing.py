"""Draws a placement as SVG: a box for every operation, coloured by its precision, and a dot for every Q/DQ.

Tooltips explain each box, line and dot: the rule, its sentence, the reason, who shares the scale. The layout comes from
qat/rules/graph_layout.py, the style from qat/rules/placement.svg.j2. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qat.graph.data_movement import first_reads
from qat.graph.network import Network, Op
from qat.graph.operations import COMMUTING, FLOAT_ONLY
from qat.rules.describe import PlacementView
from qat.rules.graph_layout import Point, Wire, lay_out
from qat.rules.obstacles import KeptFloat
from qat.rules.placement import Decision, Placement
from qat.rules.rule import RuleText

UNKNOWN = "no rule knows this operation"
TEMPLATE = Path(__file__).with_name("placement.svg.j2")
STATES = {
    "int8": "INT8",
    "float": "float, by a rule",
    "kept": "float, on request",
    "neutral": "not decided by itself",
}
OWN_COLOUR = "#14622c"  # for a scale that is not shared
GROUP_COLOURS = ("#7b3fb5", "#c2255c", "#0b7285", "#a0522d", "#364fc7", "#9c6500", "#d6336c", "#444c56")
LETTER, SMALL_LETTER = 6.1, 4.9  # mean widths; boxes without a decision are small
HEIGHT, SMALL_HEIGHT = 22.0, 15.0
STUB = 7  # how far a line goes down before it turns


@dataclass(frozen=True)
class _Box:
    """``x``, ``y``: the upper left corner."""

    x: float
    y: float
    width: float
    height: float
    state: str
    label: str
    kind: str
    tip: str


@dataclass(frozen=True)
class _Line:
    path: str
    int8: bool
    tip: str


@dataclass(frozen=True)
class _Dot:
    """``group``: the number of a scale that several tensors share, or 0."""

    x: float
    y: float
    radius: float
    group: int
    colour: str
    tip: str


def draw(view: PlacementView) -> str:
    """The picture as SVG, under a heading with the title and the summary."""
    network, placement = view.network, view.placement
    picture = _Picture(network, placement, view.rules)
    wires = picture.wires()
    layout = lay_out({op.name: picture.size(op) for op in network}, list(wires))
    lines = [picture.line(wire, wires[wire], pieces) for wire, pieces in zip(wires, layout.wires, strict=True)]
    starts = {wire.source: pieces[0][0] for wire, pieces in zip(wires, layout.wires, strict=True) if wires[wire]}
    drawn: str = _template().render(
        title=view.title,
        summary=placement.summary(),
        states=STATES,
        boxes=[picture.box(op, layout.boxes[op.name]) for op in network],
        lines=sorted(lines, key=lambda line: line.int8),  # INT8 above float
        dots=[picture.dot(tensor.tensor, starts[tensor.tensor]) for tensor in placement.tensors],
        width=layout.width,
        height=layout.height,
    )
    return drawn


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


class _Picture:
    """What the picture shows for each operation and each tensor."""

    def __init__(self, network: Network, placement: Placement, rules: Mapping[str, RuleText]) -> None:
        self.network, self.rules = network, rules
        self.decisions = {decision.op: decision for decision in placement.decisions}
        self.tensors = {tensor.tensor: tensor for tensor in placement.tensors}
        self.reads = {(reader, tensor): rule for reader, tensor, rule in placement.reads()}
        self.groups = placement.scale_groups()

    def size(self, op: Op) -> tuple[float, float]:
        """Width and height of a box, from the length of its text."""
        letters = len(f"{op.label} {_kind(op)}")
        if op.name in self.decisions or op.kind in FLOAT_ONLY:
            return letters * LETTER + 16, HEIGHT
        return letters * SMALL_LETTER + 14, SMALL_HEIGHT

    def wires(self) -> dict[Wire, bool]:
        """Two wires for every tensor, to its INT8 readers and to its other readers: wire -> whether INT8."""
        found: dict[Wire, bool] = {}
        for op in self.network:
            readers: dict[bool, list[str]] = {True: [], False: []}
            for reader in self.network.readers(op.name):
                readers[self._reads_codes(reader, op.name)].append(reader.name)
            found |= {Wire(op.name, tuple(names)): int8 for int8, names in readers.items() if names}
        return found

    def box(self, op: Op, centre: Point) -> _Box:
        """The box of ``op``."""
        decision, (width, height) = self.decisions.get(op.name), self.size(op)
        extents = (op.shape or ())[1:]
        shape = f", output {'x'.join(map(str, extents))}" if extents else ""
        tip = f"{op.label} ({op.name})\n{op.kind.replace('_', ' ')}{shape}"
        if decision is not None:
            computes = "INT8" if decision.quantized else "float"
            tip += f"\n{computes} by {self._rule(decision.rule)}"
            tip += f"\n{decision.reason}" if decision.reason else ""
        elif op.kind in FLOAT_ONLY:
            tip += f"\nfloat: {UNKNOWN}"
        x, y = centre[0] - width / 2, centre[1] - height / 2
        return _Box(x, y, width, height, _state(op, decision), op.label, _kind(op), tip)

    def line(self, wire: Wire, int8: bool, pieces: tuple[tuple[Point, Point], ...]) -> _Line:
        """The line of ``wire``."""
        readers = ", ".join(self.network[name].label for name in wire.readers)
        reads = "read as INT8" if int8 else "read in float"
        return _Line("".join(map(_curve, pieces)), int8, f"{self.network[wire.source].label}, {reads} by {readers}")

    def dot(self, tensor: str, start: Point) -> _Dot:
        """The dot of a quantized tensor, at the start of its INT8 line."""
        reads = [f"{self.network[read.reader].label}: {self._rule(read.rule)}" for read in self.tensors[tensor].reads]
        quantizer, group = self.tensors[tensor].quantizer, 0
        scale = "its own scale"
        if quantizer in self.groups:
            group = 1 + list(self.groups).index(quantizer)
            scale = f"scale {group}, shared by {', '.join(self.groups[quantizer])}"
        tip = "\n".join([f"Q/DQ of {tensor}", *reads, scale])
        colour = GROUP_COLOURS[(group - 1) % len(GROUP_COLOURS)] if group else OWN_COLOUR
        (x, y), radius = start, 7.0 if group else 4.0
        return _Dot(x, y + radius, radius, group, colour, tip)

    def _rule(self, name: str) -> str:
        return f"{name}: {self.rules[name].sentence}"

    def _reads_codes(self, reader: Op, tensor: str) -> bool:
        """Whether ``reader`` reads ``tensor`` through its quantizer, or ``tensor`` is a moved copy of codes."""
        if (reader.name, tensor) in self.reads:
            return True
        decision = self.decisions.get(reader.name)
        computes = reader.kind in COMMUTING or (decision is not None and decision.quantized)
        return computes and all(
            read in self.reads for read in first_reads(self.network, (reader.name, tensor), self.reads)
        )


def _state(op: Op, decision: Decision | None) -> str:
    if decision is None:
        return "float" if op.kind in FLOAT_ONLY else "neutral"
    if decision.quantized:
        return "int8"
    return "kept" if decision.rule == KeptFloat.name else "float"


def _kind(op: Op) -> str:
    """The kind, if it says more than the label; else ''."""
    said = ("other", op.label.rpartition(".")[2])
    return "" if op.kind in said else op.kind.replace("_", " ")


def _curve(piece: tuple[Point, Point]) -> str:
    (x, y), (end_x, end_y) = piece
    if abs(x - end_x) < 0.5:
        return f"M{x:.1f} {y:.1f}V{end_y:.1f}"
    middle = (y + STUB + end_y) / 2
    return f"M{x:.1f} {y:.1f}v{STUB}C{x:.1f} {middle:.1f} {end_x:.1f} {middle:.1f} {end_x:.1f} {end_y:.1f}"
