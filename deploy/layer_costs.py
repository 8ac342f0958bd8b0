"""Which layers of a network take longer in INT8 than in FP16, from the layer times of both engines.

Two engines fuse layers differently. To compare them, all of an engine's time is charged to the convolutions and matrix
products of the network:

- an engine layer that computes some of them, to these;
- a quantization or dequantization, to those that read its output;
- a reformat, to the same ones as the layer that it serves;
- any other layer, to those whose output it works on.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deploy.builder import open_network
from deploy.engine_layers import EngineLayer, node_names
from deploy.parsed_network import ParsedNetwork
from deploy.precision_audit import CONVOLUTION_TYPES, MATRIX_TYPES
from deploy.settings import BuildSettings
from qat.base.number_format import INT8

if TYPE_CHECKING:
    from deploy.trt import Toolkit

LEAST_SHARE = 0.01
"""Smaller differences, as a share of the engine's time, count as noise."""
_REFORMAT = re.compile(r"Reformatting CopyNode for (?:Input|Output) Tensor \d+ (?:to|from) (.*)")

NodeKind = Literal["product", "conversion", "other"]
"""``product``: a convolution or matrix product; ``conversion``: a QuantizeLinear or DequantizeLinear."""


@dataclass(frozen=True)
class CostNode:
    """A node of the network, with the names of the tensors that it reads and writes."""

    kind: NodeKind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class SlowerInInt8:
    """A convolution or matrix product that takes longer in INT8, and its milliseconds in both engines."""

    node: str
    int8: float
    fp16: float

    @property
    def loss(self) -> float:
        """How many milliseconds INT8 takes more."""
        return self.int8 - self.fp16


class LayerCosts:
    """The time of a network's nodes, from the times of an engine's layers."""

    def __init__(self, nodes: Mapping[str, CostNode]) -> None:
        self._nodes = nodes
        self._makers = {output: name for name, node in nodes.items() for output in node.outputs}
        self._readers: dict[str, list[str]] = defaultdict(list)
        for name, node in nodes.items():
            for tensor in node.inputs:
                self._readers[tensor].append(name)

    @classmethod
    def from_model(cls, toolkit: Toolkit, model: Path) -> LayerCosts:
        """For a Q/DQ file, which has all nodes of the float file too. Raises UserError when TensorRT refuses it."""
        with open_network(toolkit, model, BuildSettings()) as network:
            return cls(_nodes(network))

    def charge(self, times: Iterable[tuple[EngineLayer, float]]) -> dict[str, float]:
        """From milliseconds of engine layers to milliseconds of nodes. Time that belongs to no node is under ''."""
        costs: dict[str, float] = defaultdict(float)
        for layer, milliseconds in times:
            owners = self._owners(layer) or [""]
            for owner in owners:
                costs[owner] += milliseconds / len(owners)
        return dict(costs)

    def slower_in_int8(
        self, int8: Sequence[tuple[EngineLayer, float]], fp16: Sequence[tuple[EngineLayer, float]]
    ) -> list[SlowerInInt8]:
        """The nodes that run in INT8 and take longer there by more than ``LEAST_SHARE`` of the whole time, worst first.

        If a kernel computes several nodes, their shares of its time are not known. Such nodes count only if all of them
        together take longer.
        """
        inside = {node for layer, _ in int8 if layer.product_precision == INT8.name for node in self._products(layer)}
        at_once = [self._products(layer) for layer, _ in (*int8, *fp16)]
        in_int8, in_fp16 = self.charge(int8), self.charge(fp16)
        least = LEAST_SHARE * sum(in_int8.values())
        found = []
        for node in inside & in_int8.keys() & in_fp16.keys():
            together = {node}.union(*(nodes for nodes in at_once if node in nodes))
            if sum(in_int8.get(one, 0.0) for one in together) - sum(in_fp16.get(one, 0.0) for one in together) > least:
                found.append(SlowerInInt8(node, in_int8[node], in_fp16[node]))
        return sorted((one for one in found if one.loss > least), key=lambda one: (-one.loss, one.node))

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
        """The first convolutions and matrix products on every path from ``name``."""
        found: list[str] = []
        seen, ahead = {name}, [name]
        while ahead:
            for neighbour in neighbours(ahead.pop()):
                if neighbour not in seen:
                    seen.add(neighbour)
                    (found if self._nodes[neighbour].kind == "product" else ahead).append(neighbour)
        return found


def _nodes(network: ParsedNetwork) -> dict[str, CostNode]:
    found = {}
    for layer in network.layers:
        kind: NodeKind = "other"
        if layer.type.name in (*CONVOLUTION_TYPES, *MATRIX_TYPES):
            kind = "product"
        elif layer.type.name in ("QUANTIZE", "DEQUANTIZE"):
            kind = "conversion"
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        # An optional input that is missing is None.
        found[layer.name] = CostNode(
            kind, tuple(t.name for t in inputs if t is not None), tuple(t.name for t in outputs)
        )
    return found
