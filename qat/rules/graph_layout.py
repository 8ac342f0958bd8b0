"""Where the boxes of a graph stand in a picture: rows from top to bottom, few crossings, straight columns.

Sugiyama's layered layout. A box stands in the row that is the longest path to it. A wire that passes rows without
stopping takes a place in each of them, so that it runs beside the boxes and not through them. Rows are ordered by the
mean position of their neighbours in the row before, and then drawn towards these as far as their order allows.
Lengths are in pixels, x to the right, y down. Knows nothing of networks.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

ORDERINGS, ALIGNMENTS, STRAIGHTENINGS = 12, 30, 12  # sweeps; more of them change nothing that one could see
BESIDE, BELOW = 14.0, 20.0  # gaps between neighbours in a row, and between rows
LANE = 4.0  # width of a wire that passes a row
PORTS = 16.0  # between two wires that leave one box
GRAVITY = 0.95  # times the neighbours' mean: below 1, so that what leans to one side does not drift away

Point = tuple[float, float]


@dataclass(frozen=True)
class Wire:
    """What leads from one box to others; drawn as a tree."""

    source: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Centres of the boxes by name; for every wire its pieces, from the upper to the lower point, the first one first.

    The left upper corner of it all is (0, 0).
    """

    boxes: dict[str, Point]
    wires: tuple[tuple[tuple[Point, Point], ...], ...]
    width: float
    height: float


@dataclass(eq=False)
class _Place:
    """A place in a row, taken by a box or by a wire that passes; ``x`` and ``y`` are its centre."""

    row: int
    width: float
    height: float
    above: list[_Place] = field(default_factory=list)
    below: list[_Place] = field(default_factory=list)
    position: int = 0  # in its row
    column: float = 0.0  # width of the widest in its chain, kept free over all of the chain
    x: float = 0.0
    y: float = 0.0


_Rows = list[list[_Place]]


def lay_out(sizes: Mapping[str, tuple[float, float]], wires: Sequence[Wire]) -> Layout:
    """Places boxes.

    Args:
        sizes: (width, height) of every box, in an order in which no wire leads backwards.
        wires: between the boxes.
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
    """Links ``wire``'s source with its readers, through places of its own in the rows between; returns the links."""
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
    """Sorts every row by its neighbours' mean position, down and up in turn, and keeps the order that crosses least."""
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
        ends: list[int] = []  # where the links of the places so far end in the next row, sorted
        for place in row:
            own = [lower.position for lower in place.below]
            found += sum(len(ends) - bisect.bisect_right(ends, end) for end in own)
            for end in own:
                bisect.insort(ends, end)
    return found


# --- x


def _align(rows: _Rows) -> None:
    """Moves places towards their neighbours, down and up in turn; then makes chains straight."""
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
    """Places that follow one another without a branch."""
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
    """Gives a row the x nearest to ``wanted`` (least squares) that keep its order and its gaps.

    Less the offsets that the gaps take up, x must not fall: isotonic regression by pooling adjacent violators.
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
    """Lets x begin at 0; returns the width."""
    places = [place for row in rows for place in row]
    left = min(place.x - place.width / 2 for place in places)
    for place in places:
        place.x -= left
    return max(place.x + place.width / 2 for place in places)


# --- y, and the wires


def _descend(rows: _Rows) -> float:
    """Sets y, with more room where wires lead far to the side; returns the height."""
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
    """How far from its box's centre each wire leaves it: several side by side, in the order of where they lead."""
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
    """From the bottom of each place to the top of the next, and straight through those that are only passed."""
    source, found = tree[0][0], []
    passed = {upper for upper, _ in tree} - {source}
    for upper, lower in tree:
        start = upper.x + (port if upper is source else 0.0)
        top = lower.y - lower.height / 2
        found.append(((start, upper.y + upper.height / 2), (lower.x, top)))
        if lower in passed:
            found.append(((lower.x, top), (lower.x, lower.y + lower.height / 2)))
    return tuple(found)
