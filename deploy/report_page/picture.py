"""A picture of the network with its blocks folded: a box for each, coloured by what it computes in or by its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.report_page.artifacts import Artifacts
from deploy.report_page.layers import Block, Layer, State, block_of
from qat.rules.graph_layout import Point, Wire, lay_out

_LETTER, _HEIGHT, _MARGIN = 7.2, 40.0, 12.0
_ENDS = ("input", "output")


@dataclass(frozen=True)
class Box:
    """A block, or operations of it that stand together. ``x``, ``y``: the upper left corner, in pixels.

    ``first``: where its first layer is on the page, to jump to; '' if it has none. ``heat``: its time, of the longest.
    """

    x: float
    y: float
    width: float
    height: float
    name: str
    summary: str
    state: State
    first: str
    heat: float


@dataclass(frozen=True)
class Picture:
    """Boxes, lines between them as paths, and the size, in pixels. ``timed``: whether boxes have times."""

    boxes: tuple[Box, ...]
    paths: tuple[str, ...]
    width: float
    height: float
    timed: bool


def draw(run: Artifacts, layers: Sequence[Layer], ids: Mapping[int, str]) -> Picture | None:
    """The picture; None if the artifacts have not recorded the network. ``ids``: of layers on the page, by ``id``."""
    source = run.checkpoint or run.onnx
    ops: Sequence[Mapping[str, Any]] = source.details.get("network", []) if source else []
    if not ops:
        return None
    groups, member = _groups(ops)
    known = {layer.name: layer for layer in layers}
    blocks = {key: Block(_title(key), tuple(known[op] for op in names if op in known)) for key, names in groups.items()}
    readers: dict[str, list[str]] = {key: [] for key in groups}
    for op in ops:
        for made_by in op["inputs"]:
            here, there = member.get(made_by), member[op["name"]]
            if here is not None and here != there and there not in readers[here]:
                readers[here].append(there)
    wires = [Wire(key, tuple(found)) for key, found in readers.items() if found]
    sizes = {key: (_width(block), _HEIGHT) for key, block in blocks.items()}
    layout = lay_out(sizes, wires)
    longest = max((block.milliseconds or 0.0 for block in blocks.values()), default=0.0)
    boxes = tuple(
        Box(
            round(layout.boxes[key][0] - sizes[key][0] / 2 + _MARGIN, 1),
            round(layout.boxes[key][1] - _HEIGHT / 2 + _MARGIN, 1),
            round(sizes[key][0], 1),
            _HEIGHT,
            block.name,
            block.summary if block.layers else "",
            block.worst if block.layers else "moves",
            ids[id(block.layers[0])] if block.layers else "",
            round((block.milliseconds or 0.0) / longest, 3) if longest else 0.0,
        )
        for key, block in blocks.items()
    )
    paths = tuple("".join(map(_curve, pieces)) for pieces in layout.wires)
    return Picture(boxes, paths, layout.width + 2 * _MARGIN, layout.height + 2 * _MARGIN, longest > 0)


def _groups(ops: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Operations of one block that follow each other, by a key; and the key of each operation.

    Operations are in an order in which none comes before what it reads, so no group reads one that comes after it.
    """
    groups: dict[str, list[str]] = {}
    member: dict[str, str] = {}
    last, count = "", 0
    for op in ops:
        block = op["name"] if op["kind"] in _ENDS else block_of(op["label"])
        if block != last:
            last, count = block, count + 1
        key = f"{count} {block}"
        groups.setdefault(key, []).append(op["name"])
        member[op["name"]] = key
    return groups, member


def _title(key: str) -> str:
    return key.split(" ", 1)[1]


def _width(block: Block) -> float:
    text = max(len(block.name), len(block.summary) if block.layers else 0)
    return text * _LETTER + 20


def _curve(piece: tuple[Point, Point]) -> str:
    (x, y), (end_x, end_y) = ((round(px + _MARGIN, 1), round(py + _MARGIN, 1)) for px, py in piece)
    if abs(x - end_x) < 0.5:
        return f"M{x} {y}V{end_y}"
    middle = round((y + end_y) / 2, 1)
    return f"M{x} {y}C{x} {middle} {end_x} {middle} {end_x} {end_y}"
