"""Runs a network piece by piece: up to a node, then the next nodes any number of times, then on from there.

AdaRound uses it: it optimizes one layer after another, and the tensors before a layer are computed only once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx


class Stepper:
    """A network that is run step by step. For each mini-batch it keeps the tensors that later nodes will read."""

    def __init__(self, model: fx.GraphModule, graph: fx.Graph, images: Sequence[Tensor]) -> None:
        """``graph``: the graph of ``model``, or of the model of which it is a copy; ``images``: [N, C, H, W] each."""
        self._interpreter = fx.Interpreter(model, graph=graph)
        (given,) = graph.find_nodes(op="placeholder")
        device = next(model.parameters()).device
        # Copies, because in-place operations change them.
        self._tensors = [{given: x_NCHW.to(device, copy=True)} for x_NCHW in images]
        self._ahead = [node for node in graph.nodes if node is not given]

    def run_to(self, node: fx.Node) -> None:
        """Runs all remaining nodes before ``node``."""
        position = self._ahead.index(node)
        passed, self._ahead = self._ahead[:position], self._ahead[position:]
        for tensors in self._tensors:
            self._interpreter.env = tensors
            for done in passed:
                tensors[done] = self._interpreter.run_node(done)
                for read in self._interpreter.user_to_last_uses.get(done, ()):
                    del tensors[read]

    def output_of(self, nodes: Sequence[fx.Node], batch: int) -> Tensor:
        """Runs ``nodes``, which come next, on one mini-batch and returns the last one's output; does not advance."""
        self._interpreter.env = dict(self._tensors[batch])
        for node in nodes:
            self._interpreter.env[node] = self._interpreter.run_node(node)
        output: Tensor = self._interpreter.env[nodes[-1]]
        return output
