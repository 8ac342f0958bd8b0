"""Parts of a network that may be left in float together: what lies between two places where one tensor passes.

Leaving single layers in float rarely pays, because both of their ends convert. Inside of a region nothing does.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from qat.graph.network import Network
from qat.graph.operations import WEIGHTED
from qat.rules.keep_float import CHOOSABLE


@dataclass(frozen=True)
class Region:
    """Operations by label, the milliseconds that INT8 loses on them, and how they were found."""

    labels: frozenset[str]
    loss: float
    kind: str

    def __str__(self) -> str:
        first = min(self.labels)
        return f"{self.kind}: {len(self.labels)} from {first} (INT8 loses {1000 * self.loss:.1f} us)"


def segments(network: Network) -> list[list[str]]:
    """The operations between neighbouring cuts, in order. A cut is a tensor that alone leads from what is before it on.

    Each list has the names of its operations; together they are the whole network.
    """
    order = list(network.ops)
    position = {name: index for index, name in enumerate(order)}
    last_read = {name: max((position[reader.name] for reader in network.readers(name)), default=-1) for name in order}
    found: list[list[str]] = [[]]
    furthest = -1  # how far what is before is read
    for index, name in enumerate(order):
        found[-1].append(name)
        alone = furthest <= index
        furthest = max(furthest, last_read[name])
        if alone and index < len(order) - 1:
            found.append([])
    return [segment for segment in found if segment]


def losing_regions(network: Network, loss: Mapping[str, float], kept: Collection[str] = ()) -> list[Region]:
    """Regions to leave in float, the one that promises most first.

    Args:
        network: the neutral view.
        loss: milliseconds that each layer takes longer in INT8 than in FP16, by label; less than 0 where it gains.
        kept: labels that are in float already.

    Regions are: neighbouring layers that lose; all layers that lose; segments, and runs of segments, that lose as a
    whole. Those that hold nothing new are left out.
    """
    losing = {op.name for op in network if op.kind in WEIGHTED and loss.get(op.label, 0.0) > 0}
    parts = segments(network)
    found: list[tuple[str, Iterable[str]]] = [("neighbours", part) for part in _neighbours(network, losing)]
    found.append(("all layers that lose", losing))
    found += [("segment", part) for part in parts]
    found += [("run of segments", [name for part in run for name in part]) for run in _runs(network, parts, loss)]
    regions: dict[frozenset[str], Region] = {}
    for kind, names in found:
        labels = frozenset(network[name].label for name in names if network[name].kind in CHOOSABLE) - set(kept)
        total = sum(loss.get(label, 0.0) for label in labels)
        if labels and total > 0 and any(network[name].kind in WEIGHTED for name in names):
            regions.setdefault(labels, Region(labels, total, kind))
    return sorted(regions.values(), key=lambda region: (-region.loss, len(region.labels), sorted(region.labels)))


def grown(network: Network, region: Region, loss: Mapping[str, float]) -> Region:
    """The region with the weighted layers next to it on all sides."""
    names = {op.name for op in network if op.label in region.labels}
    beside = {other for name in names for other in _beside(network, name)} - names
    labels = region.labels | {network[name].label for name in beside}
    return Region(labels, sum(loss.get(label, 0.0) for label in labels), f"{region.kind}, grown")


def changes(network: Network, kept: Collection[str]) -> list[tuple[str, frozenset[str]]]:
    """What else may be left in float than ``kept``, changed a little: what the change is, and the labels.

    What is between two connected parts is left in float too; a part goes back to INT8; a layer at the end of one does;
    a layer beside one is left in float too.
    """
    kept = frozenset(kept)
    names = {op.name for op in network if op.label in kept and op.kind in WEIGHTED}
    others = kept - {network[name].label for name in names}  # sums and the like, which make no sense without layers
    found = []
    parts = [sorted(part, key=network.position) for part in _neighbours(network, names)]
    parts.sort(key=lambda part: network.position(part[0]))
    for before, after in itertools.pairwise(parts):
        between = range(network.position(before[-1]), network.position(after[0]))
        gap = [op.label for op in network if network.position(op.name) in between and op.kind in WEIGHTED]
        found.append((f"{before[-1]} to {after[0]} in float too", kept | set(gap)))
    for part in parts:
        back = frozenset(network[name].label for name in part)
        left = kept - back if kept - back - others else frozenset[str]()
        found.append((f"{', '.join(part[:2])}{' ...' * (len(part) > 2)} back to INT8", left))
        ends = [name for name in part if _beside(network, name) - names] if len(part) > 1 else []
        found += [(f"{name} back to INT8", kept - {network[name].label}) for name in ends]
        beside = sorted({other for name in part for other in _beside(network, name)} - names)
        found += [(f"{name} in float too", kept | {network[name].label}) for name in beside]
    return found


def _neighbours(network: Network, chosen: Collection[str]) -> Iterable[set[str]]:
    """The connected parts of the weighted layers ``chosen``."""
    left = set(chosen)
    while left:
        part, waiting = set(), [left.pop()]
        while waiting:
            current = waiting.pop()
            part.add(current)
            more = _beside(network, current) & left
            left -= more
            waiting += more
        yield part


def _beside(network: Network, name: str) -> set[str]:
    """The nearest weighted layers before and after an operation."""
    found: set[str] = set()
    for ways in (lambda op: op.inputs, lambda op: tuple(reader.name for reader in network.readers(op.name))):
        seen, waiting = {name}, [name]
        while waiting:
            for other in ways(network[waiting.pop()]):
                if other not in seen and other in network.ops:
                    seen.add(other)
                    if network[other].kind in WEIGHTED:
                        found.add(other)
                    else:
                        waiting.append(other)
    return found


def _runs(network: Network, parts: list[list[str]], loss: Mapping[str, float]) -> list[list[list[str]]]:
    """For each segment the run that ends with it and loses most, if it is longer than one."""
    found = []
    total, start = 0.0, 0
    for end, part in enumerate(parts):
        if total <= 0:
            total, start = 0.0, end
        total += sum(loss.get(network[name].label, 0.0) for name in part)
        if total > 0 and start < end:
            found.append(parts[start : end + 1])
    return found
