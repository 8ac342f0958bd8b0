"""Which layers of a network take longer in INT8 than in FP16, by the times of the layers of both engines.

All of an engine's time is charged to the network's convolutions and matrix products, so that two engines that fuse
differently can be compared: a layer that computes some of them is charged to these; a Q or DQ, to those that read what
it writes; a reformat, as the layer that it is for; anything else, to those whose output it works on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deploy.builder import parsed
from deploy.layers import EngineLayer, node_names
from deploy.parsed_network import ParsedNetwork
from deploy.precision import CONVOLUTION_TYPES, MATRIX_TYPES
from deploy.settings import BuildSettings

if TYPE_CHECKING:
    from deploy.trt import Toolkit

LEAST_SHARE = 0.01
"""Differences below this share of the engine's time are taken for noise."""
_REFORMAT = re.compile(r"Reformatting CopyNode for (?:Input|Output) Tensor \d+ (?:to|from) (.*)")


@dataclass(frozen=True)
class Node:
    """A node of the network, with the names of its tensors. ``product``: a convolution or matrix product."""

    kind: Literal["product", "conversion", "other"]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Slower:
    """A convolution or matrix product that takes longer in INT8, with all that is charged to it, in milliseconds."""

    node: str
    int8: float
    fp16: float

    @property
    def lost(self) -> float:
        """What INT8 costs here."""
        return self.int8 - self.fp16


class LayerCosts:
    """The time of a network's nodes, from that of an engine's layers."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self._nodes = nodes
        self._makers = {output: name for name, node in nodes.items() for output in node.outputs}
        self._readers: dict[str, list[str]] = defaultdict(list)
        for name, node in nodes.items():
            for tensor in node.inputs:
                self._readers[tensor].append(name)

    @classmethod
    def from_model(cls, toolkit: Toolkit, model: Path) -> LayerCosts:
        """Of a Q/DQ file, which has all nodes of the float file too. Raises UserError when it is refused."""
        with parsed(toolkit, model, BuildSettings()) as graph:
            return cls(_nodes(graph))

    def charge(self, times: Iterable[tuple[EngineLayer, float]]) -> dict[str, float]:
        """From the times of an engine's layers to those of nodes; what can be charged to nobody is under ''."""
        costs: dict[str, float] = defaultdict(float)
        for layer, milliseconds in times:
            owners = self._owners(layer) or [""]
            for owner in owners:
                costs[owner] += milliseconds / len(owners)
        return dict(costs)

    def slower_in_int8(
        self, int8: Sequence[tuple[EngineLayer, float]], fp16: Sequence[tuple[EngineLayer, float]]
    ) -> list[Slower]:
        """The nodes that run in INT8 and take longer there by a notable share of the whole, worst first.

        How the time of a kernel that computes several nodes at once is shared by them is not known, so that such nodes
        count only where all of them together take longer.
        """
        inside = {node for layer, _ in int8 if layer.product_precision == "INT8" for node in self._products(layer)}
        at_once = [self._products(layer) for layer, _ in (*int8, *fp16)]
        ours, theirs = self.charge(int8), self.charge(fp16)
        least = LEAST_SHARE * sum(ours.values())
        found = []
        for node in inside & ours.keys() & theirs.keys():
            together = {node}.union(*(nodes for nodes in at_once if node in nodes))
            if sum(ours.get(one, 0.0) for one in together) - sum(theirs.get(one, 0.0) for one in together) > least:
                found.append(Slower(node, ours[node], theirs[node]))
        return sorted((one for one in found if one.lost > least), key=lambda one: (-one.lost, one.node))

    def _products(self, layer: EngineLayer) -> list[str]:
        """The convolutions and matrix products that ``layer`` computes."""
        return [] if _REFORMAT.match(layer.name) else self._products_of(layer.own_nodes)

    def _products_of(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self._nodes and self._nodes[name].kind == "product"]

    def _owners(self, layer: EngineLayer) -> list[str]:
        reformatted = _REFORMAT.match(layer.name)
        names = node_names(reformatted[1]) if reformatted else layer.own_nodes
        known = [name for name in names if name in self._nodes]
        if (products := self._products_of(known)) or not known:
            return products
        converts = all(self._nodes[name].kind == "conversion" for name in known)
        before = [] if converts else self._nearest(known[0], self._preceding)
        return before or self._nearest(known[-1], self._following)

    def _following(self, name: str) -> Iterator[str]:
        for tensor in self._nodes[name].outputs:
            yield from self._readers[tensor]

    def _preceding(self, name: str) -> Iterator[str]:
        for tensor in self._nodes[name].inputs:
            if tensor in self._makers:
                yield self._makers[tensor]

    def _nearest(self, name: str, neighbours: Callable[[str], Iterator[str]]) -> list[str]:
        """The first convolutions and matrix products that are met on every way from ``name``."""
        found: list[str] = []
        seen, ahead = {name}, [name]
        while ahead:
            for neighbour in neighbours(ahead.pop()):
                if neighbour not in seen:
                    seen.add(neighbour)
                    (found if self._nodes[neighbour].kind == "product" else ahead).append(neighbour)
        return found


def _nodes(graph: ParsedNetwork) -> dict[str, Node]:
    found = {}
    for layer in graph.layers:
        kind: Literal["product", "conversion", "other"] = "other"
        if layer.type.name in (*CONVOLUTION_TYPES, *MATRIX_TYPES):
            kind = "product"
        elif layer.type.name in ("QUANTIZE", "DEQUANTIZE"):
            kind = "conversion"
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        # An input that is left out is None.
        found[layer.name] = Node(kind, tuple(t.name for t in inputs if t is not None), tuple(t.name for t in outputs))
    return found
