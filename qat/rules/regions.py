"""Which layers to leave in float together, by the times of layers and what the conversions between types cost.

Leaving single layers in float rarely pays, because their ends convert. Given a price of a conversion, the placement of
the least time is a minimum cut of a graph: on one side the operations in float, on the other those in INT8. The cut
goes through what each layer takes longer in its type, and through the tensors that are converted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping

import networkx as nx

from qat.graph.network import Network, Op
from qat.graph.operations import COMMUTING, FLOAT_ONLY, WEIGHTED
from qat.rules.keep_float import CHOOSABLE

_VECTOR = 32  # channels that INT8 tensors are stored in at a time
_UNIT = 1e9  # capacities are whole numbers, in which a cut is exact
_FLOAT, _INT8 = ("float", ""), ("int8", "")  # the two ends of the graph; its other nodes are (role, operation)
Kept = frozenset[str]
"""Labels of the operations that stay in float."""


class TypeCosts:
    """Times of a network's layers in both types, for any price of a conversion.

    Args:
        network: the neutral view.
        loss: milliseconds that each layer takes longer in INT8 than in FP16, by label; less than 0 where it gains.
            Other layers have no INT8 kernel.
    """

    def __init__(self, network: Network, loss: Mapping[str, float]) -> None:
        self._network, self._loss = network, loss

    @property
    def can_gain(self) -> bool:
        """Whether any layer loses in INT8."""
        return any(loss > 0 for loss in self._loss.values())

    @property
    def dearest(self) -> float:
        """The price at which conversions cost as much as all layers that lose would gain in float by themselves."""
        kept = self.cheapest(0.0)
        return self.loss(kept) / (self.converted(kept) or 1.0)

    def loss(self, kept: Kept) -> float:
        """Milliseconds that the layers ``kept`` in float take less there, without conversions."""
        return sum(self._loss.get(label, 0.0) for label in kept)

    def cheapest(self, price: float) -> Kept:
        """What to leave in float where converting a million values takes ``price`` milliseconds."""
        graph = self._conversions(price)
        for op in self._network:
            loss = self._loss.get(op.label, 0.0) if op.kind in WEIGHTED else 0.0
            if self._has_no_kernel(op):
                graph.add_edge(_FLOAT, ("op", op.name))
            elif loss > 0:  # what it costs to be INT8
                graph.add_edge(_FLOAT, ("op", op.name), capacity=_whole(loss))
            elif loss < 0:
                graph.add_edge(("op", op.name), _INT8, capacity=_whole(-loss))
        # Of several minimum cuts networkx takes that with the smallest part at the end: as little as possible in float.
        _, (_, floats) = nx.minimum_cut(graph.reverse(copy=False), _INT8, _FLOAT)
        return frozenset(
            op.label
            for op in self._network
            if ("op", op.name) in floats and op.kind in CHOOSABLE and not self._has_no_kernel(op)
        )

    def converted(self, kept: Kept) -> float:
        """Millions of values that are converted where ``kept`` is in float and all other layers in INT8."""
        graph = self._conversions(1.0)
        for op in self._network:
            if self._has_no_kernel(op) or op.label in kept:
                graph.add_edge(_FLOAT, ("op", op.name))
            elif op.kind in WEIGHTED:
                graph.add_edge(("op", op.name), _INT8)
        return int(nx.minimum_cut_value(graph, _FLOAT, _INT8)) / _UNIT

    def _has_no_kernel(self, op: Op) -> bool:
        return op.kind in FLOAT_ONLY or (op.kind in WEIGHTED and op.label not in self._loss)

    def _conversions(self, price: float) -> nx.DiGraph:
        """Edges between operations: a tensor costs once if its maker and a reader have other types.

        TensorRT moves a Q in front of what only moves data, so that is in INT8 if one of its readers is. The network's
        inputs and outputs are float in all engines, and are in the layers' times.
        """
        graph = nx.DiGraph()
        graph.add_nodes_from((_FLOAT, _INT8))
        for op in self._network:
            readers = [reader for reader in self._network.readers(op.name) if reader.kind != "output"]
            if op.kind in ("input", "output") or not readers:
                continue
            maker, cost = ("op", op.name), _whole(price * _stored_values(op) / 1e6)
            graph.add_edge(("to float", op.name), maker, capacity=cost)
            graph.add_edge(maker, ("to int8", op.name), capacity=cost)
            for reader in readers:
                graph.add_edge(("op", reader.name), ("to float", op.name))  # without a capacity, it is never cut
                graph.add_edge(("to int8", op.name), ("op", reader.name))
                if op.kind in COMMUTING:
                    graph.add_edge(maker, ("op", reader.name))
        return graph


def _whole(milliseconds: float) -> int:
    return round(_UNIT * milliseconds)


def _stored_values(op: Op) -> float:
    """Values of its output for one image, with channels in whole vectors; 1 if the shape is not known."""
    if not op.shape or len(op.shape) < 2:
        return 1.0
    channels = math.ceil(op.shape[1] / _VECTOR) * _VECTOR if len(op.shape) == 4 else op.shape[1]
    return float(channels * math.prod(op.shape[2:]))


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
