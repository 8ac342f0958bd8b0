"""Lays out the boxes of a graph for a picture: rows from top to bottom, few crossings, straight columns.

This is Sugiyama's layered layout. The row of a box is the length of the longest path to it. A wire that passes through
a row takes a place in it, so that it runs beside the boxes and not through them. The places of a row are ordered by the
mean position of their neighbours in the previous row, and then moved towards these as far as the order allows. Lengths
are in pixels, x points right, y down. This module knows nothing about networks.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

ORDERINGS, ALIGNMENTS, STRAIGHTENINGS = 12, 30, 12  # numbers of sweeps; more make no visible difference
BESIDE, BELOW = 14.0, 20.0  # gaps between neighbours in a row, and between rows
LANE = 4.0  # width of a wire that passes a row
PORTS = 16.0  # between two wires that leave one box
GRAVITY = 0.95  # factor of the neighbours' mean; below 1, so that a lopsided graph does not drift to one side

Point = tuple[float, float]


@dataclass(frozen=True)
class Wire:
    """A connection from one box to others; it is drawn as a tree."""

    source: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Centres of the boxes by name; for every wire its pieces, each (upper point, lower point), from the source on.

    The upper left corner of the picture is (0, 0).
    """

    boxes: dict[str, Point]
    wires: tuple[tuple[tuple[Point, Point], ...], ...]
    width: float
    height: float


@dataclass(eq=False)
class _Place:
    """A place in a row, for a box or for a passing wire; ``x`` and ``y`` are its centre."""

    row: int
    width: float
    height: float
    above: list[_Place] = field(default_factory=list)
    below: list[_Place] = field(default_factory=list)
    position: int = 0  # in its row
    column: float = 0.0  # width of the widest place in its chain; it is reserved along the whole chain
    x: float = 0.0
    y: float = 0.0


_Rows = list[list[_Place]]


def lay_out(sizes: Mapping[str, tuple[float, float]], wires: Sequence[Wire]) -> Layout:
    """The positions of boxes and wires.

    Args:
        sizes: (width, height) of every box, ordered so that no wire leads backwards.
        wires: the connections between the boxes.
    """
    boxes = _boxes(sizes, wires)
    rows: _Rows = [[] for _ in range(1 + max(box.row for box in boxes.values()))]
    for box in boxes.values():
        rows[box.row].append(box)
    trees = [_tree(wire, boxes, rows) for wire in wires]
    _order(rows)
    _align(rows)
    width = _shift(rows)
    height = _descend(rows)
    ports = _ports(wires, trees)
    pieces = tuple(_pieces(tree, port) for tree, port in zip(trees, ports, strict=True))
    return Layout({name: (box.x, box.y) for name, box in boxes.items()}, pieces, width, height)


# --- the graph in rows


def _boxes(sizes: Mapping[str, tuple[float, float]], wires: Sequence[Wire]) -> dict[str, _Place]:
    sources: dict[str, list[str]] = {name: [] for name in sizes}
    for wire in wires:
        for reader in wire.readers:
            sources[reader].append(wire.source)
    boxes: dict[str, _Place] = {}
    for name, (width, height) in sizes.items():
        boxes[name] = _Place(1 + max((boxes[source].row for source in sources[name]), default=-1), width, height)
    return boxes


def _tree(wire: Wire, boxes: Mapping[str, _Place], rows: _Rows) -> list[tuple[_Place, _Place]]:
    """Links the source of ``wire`` to its readers, through its own places in the rows between; returns the links."""
    place, readers = boxes[wire.source], [boxes[name] for name in wire.readers]
    last = max(reader.row for reader in readers)
    links = []
    for row in range(place.row + 1, last + 1):
        passing = [_Place(row, LANE, 0.0)] if row < last else []
        rows[row] += passing
        for lower in [reader for reader in readers if reader.row == row] + passing:
            place.below.append(lower)
            lower.above.append(place)
            links.append((place, lower))
        place = passing[0] if passing else place
    return links


# --- the order within rows


def _order(rows: _Rows) -> None:
    """Sorts every row by its neighbours' mean position, down and up in turn; keeps the order with fewest crossings."""
    _number(rows)
    best, fewest = [list(row) for row in rows], _crossings(rows)
    for sweep in range(ORDERINGS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            means = {place: _mean_position(place, place.above if down else place.below) for place in row}
            row.sort(key=means.__getitem__)
            _number([row])
        crossings = _crossings(rows)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    rows[:] = best
    _number(rows)


def _number(rows: _Rows) -> None:
    for row in rows:
        for position, place in enumerate(row):
            place.position = position


def _mean_position(place: _Place, neighbours: list[_Place]) -> float:
    return fmean(neighbour.position for neighbour in neighbours) if neighbours else place.position


def _crossings(rows: _Rows) -> int:
    found = 0
    for row in rows:
        ends: list[int] = []  # sorted positions in the next row at which the links so far end
        for place in row:
            own = [lower.position for lower in place.below]
            found += sum(len(ends) - bisect.bisect_right(ends, end) for end in own)
            for end in own:
                bisect.insort(ends, end)
    return found


# --- x


def _align(rows: _Rows) -> None:
    """Moves places towards their neighbours, down and up in turn; then straightens chains."""
    chains = _chains(rows)
    for chain in chains:
        widest = max(place.width for place in chain)
        for place in chain:
            place.column = widest
    for row in rows:
        _settle(row, [0.0] * len(row))
    for sweep in range(ALIGNMENTS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            neighbours = [(place.above if down else place.below) or [place] for place in row]
            _settle(row, [GRAVITY * fmean(neighbour.x for neighbour in found) for found in neighbours])
    for _ in range(STRAIGHTENINGS):
        for chain in chains:
            mean = fmean(place.x for place in chain)
            for place in chain:
                place.x = mean
        for row in rows:
            _settle(row, [place.x for place in row])


def _chains(rows: _Rows) -> list[list[_Place]]:
    """Sequences of places that follow one another without a branch."""
    chains: list[list[_Place]] = []
    chain_of: dict[_Place, list[_Place]] = {}
    for row in rows:
        for place in row:
            if len(place.above) == 1 and len(place.above[0].below) == 1:
                chain_of[place] = chain_of[place.above[0]]
            else:
                chain_of[place] = []
                chains.append(chain_of[place])
            chain_of[place].append(place)
    return chains


def _settle(row: list[_Place], wanted: list[float]) -> None:
    """Sets the x of a row as near to ``wanted`` (least squares) as its order and gaps allow.

    After subtracting the offsets due to the gaps, x must not decrease: isotonic regression by pooling adjacent
    violators.
    """
    offsets = [0.0]
    for left, right in itertools.pairwise(row):
        offsets.append(offsets[-1] + (left.column + right.column) / 2 + BESIDE)
    pools: list[tuple[float, int]] = []  # (sum, count)
    for x, offset in zip(wanted, offsets, strict=True):
        total, count = x - offset, 1
        while pools and pools[-1][0] / pools[-1][1] >= total / count:
            before, members = pools.pop()
            total, count = total + before, count + members
        pools.append((total, count))
    means = [total / count for total, count in pools for _ in range(count)]
    for place, mean, offset in zip(row, means, offsets, strict=True):
        place.x = mean + offset


def _shift(rows: _Rows) -> float:
    """Shifts x so that it begins at 0; returns the width."""
    places = [place for row in rows for place in row]
    left = min(place.x - place.width / 2 for place in places)
    for place in places:
        place.x -= left
    return max(place.x + place.width / 2 for place in places)


# --- y, and the wires


def _descend(rows: _Rows) -> float:
    """Sets y, with larger gaps where wires lead far to the side; returns the height."""
    top = bottom = 0.0
    for row in rows:
        height = max(place.height for place in row)
        for place in row:
            place.y = top + height / 2
            place.height = place.height or height
        bottom = top + height
        reach = max((abs(lower.x - place.x) for place in row for lower in place.below), default=0.0)
        top = bottom + BELOW + min(reach / 12, 30.0)
    return bottom


def _ports(wires: Sequence[Wire], trees: Sequence[list[tuple[_Place, _Place]]]) -> list[float]:
    """The offset from its box's centre at which each wire leaves; several leave side by side, ordered by target."""
    leaving: dict[str, list[int]] = {}
    for index, wire in enumerate(wires):
        leaving.setdefault(wire.source, []).append(index)
    ports = [0.0] * len(wires)
    for indices in leaving.values():
        first = trees[indices[0]][0][0]
        toward = {index: fmean(lower.x for upper, lower in trees[index] if upper is first) for index in indices}
        for place, index in enumerate(sorted(indices, key=toward.__getitem__)):
            ports[index] = (place - (len(indices) - 1) / 2) * PORTS
    return ports


def _pieces(tree: list[tuple[_Place, _Place]], port: float) -> tuple[tuple[Point, Point], ...]:
    """The pieces from the bottom of each place to the top of the next, and straight through the passed places."""
    source, found = tree[0][0], []
    passed = {upper for upper, _ in tree} - {source}
    for upper, lower in tree:
        start = upper.x + (port if upper is source else 0.0)
        top = lower.y - lower.height / 2
        found.append(((start, upper.y + upper.height / 2), (lower.x, top)))
        if lower in passed:
            found.append(((lower.x, top), (lower.x, lower.y + lower.height / 2)))
    return tuple(found)
