"""What quantization costs, operation by operation: the error of its output, the loss with it alone and without it.

A network that was prepared for INT8 is run with any part of its operations quantized; the modules are those of the
network itself, so nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qat.base.sqnr import sqnr_db
from qat.evaluate import Accuracy, accuracy
from qat.fake_quantize.prepare import WEIGHT_QUANTIZERS, placement_of, weights_and_quantizers
from qat.fake_quantize.quantizer import ActivationQuantizer
from qat.graph.data_movement import movers_before
from qat.graph.inner_outputs import with_inner_outputs
from qat.graph.network import Network, Op

_OUTPUT_IMAGES = 8  # on which outputs are compared


@dataclass(frozen=True)
class Cost:
    """What the quantization of one operation costs.

    ``sqnr_db``: of its output, quantized, to its output in float, of the same float inputs; None where they are equal.
    ``loss_alone``: of the float network with this operation quantized. ``loss_without``: of the quantized network with
    this operation in float. ``multiply_adds``: its share of all, from 0 to 1.
    """

    op: str
    label: str
    kind: str
    sqnr_db: float | None
    loss_alone: float
    loss_without: float
    multiply_adds: float


class PartlyQuantized:
    """A prepared network, of which any part can be measured in INT8."""

    def __init__(self, prepared: fx.GraphModule, network: Network, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """``network``: the view of the same network; ``batches``: normalized images [N, C, H, W] and labels [N]."""
        self.prepared, self.network, self.batches = prepared.eval(), network, list(batches)
        self.ops = tuple(decision.op for decision in placement_of(prepared).decisions if decision.quantized)
        self.all = frozenset(self.ops)
        self._nodes = {node.name: node for node in prepared.graph.nodes}

    def measure(self, quantized: frozenset[str]) -> Accuracy:
        """The network with only the operations ``quantized`` in INT8."""
        with self._only(quantized) as model:
            return accuracy(model, self.batches)

    def costs(self) -> Iterator[Cost]:
        """Of every quantized operation, in the order of the network."""
        total = sum(map(multiply_adds, self.network)) or 1
        for name in self.ops:
            op = self.network[name]
            alone, without = self.measure(frozenset({name})), self.measure(self.all - {name})
            share = multiply_adds(op) / total
            yield Cost(name, op.label, op.kind, self.sqnr_db(name), alone.loss, without.loss, share)

    def sqnr_db(self, op: str) -> float | None:
        """Of the output of ``op``, which alone is quantized."""
        x = self.batches[0][0][:_OUTPUT_IMAGES]
        outputs = []
        with torch.no_grad():
            for quantized in ((), (op,)):
                with self._only(frozenset(quantized)) as model:
                    outputs.append(with_inner_outputs(model, [op])(x)[1][0].double())
        noise = float((outputs[1] - outputs[0]).square().sum())
        return sqnr_db(float(outputs[0].square().sum()), noise)

    def keep_float(self, costs: Iterable[Cost], least_top1: float) -> list[tuple[Cost, Accuracy]]:
        """Operations to keep in float, until the accuracy is ``least_top1`` percent: first those that gain most.

        Each comes with what the network measures without it and those before it. [] where none needs to be kept.
        """
        kept: list[tuple[Cost, Accuracy]] = []
        found, left = self.measure(self.all), self.all
        for cost in sorted(costs, key=lambda cost: cost.loss_without):
            if found.top1 >= least_top1:
                break
            left -= {cost.op}
            found = self.measure(left)
            kept.append((cost, found))
        return kept

    @contextmanager
    def _only(self, quantized: frozenset[str]) -> Iterator[fx.GraphModule]:
        """The network in which only ``quantized`` operations read codes. Modules are shared, so one at a time."""
        readers = {reader for op in quantized for reader in self._readers(op)}
        owners = {self._owner(op) for op in quantized}
        weights = list(weights_and_quantizers(self.prepared))
        for path, _, quantizer in weights:
            quantizer.enabled = path in owners
        try:
            yield self._reading(readers)
        finally:
            for _, _, quantizer in weights:
                quantizer.enabled = True

    def _readers(self, op: str) -> set[str]:
        """The operations that read for ``op``: itself, and what moves data on the way to it."""
        return {op, *movers_before(self.network, self.network[op])}

    def _owner(self, op: str) -> str:
        """The path by which ``weights_and_quantizers`` names the weight of ``op``."""
        node = self._nodes[op]
        return f"{node.target}.weight_quantizer" if node.op == "call_module" else f"{WEIGHT_QUANTIZERS}.{op}"

    def _reading(self, readers: set[str]) -> fx.GraphModule:
        """The network, its modules shared, in which only ``readers`` read through quantizers."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.prepared.graph, copied))
        for node, copy in copied.items():
            if node.op == "call_module" and isinstance(
                self.prepared.get_submodule(str(node.target)), ActivationQuantizer
            ):
                source = copied[node.all_input_nodes[0]]
                for reader in list(copy.users):
                    if reader.name not in readers:
                        reader.replace_input_with(copy, source)
        return fx.GraphModule(self.prepared, graph)


def multiply_adds(op: Op) -> int:
    """Of a convolution or linear layer, for one image; 0 of anything else."""
    if op.weight is None:
        return 0
    return op.elements * op.weight.in_channels // op.weight.groups * math.prod(op.weight.kernel)
