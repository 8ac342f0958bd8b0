"""Makes tensors inside a traced network additional outputs of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx


def with_inner_outputs(model: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """A network that returns (the output of ``model``, its inner tensors ``names``); the modules are shared."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(model.graph, copied)
    by_name = {node.name: copy for node, copy in copied.items()}
    graph.output((output, [by_name[name] for name in names]))
    return fx.GraphModule(model, graph)
