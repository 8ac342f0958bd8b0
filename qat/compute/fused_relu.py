"""Fuses, for training, a ReLU and the quantizer after it into one operation with one mask for the backward pass.

Separately, each of the two keeps one byte per element to record where the gradient passes: the ReLU for values above
zero, the quantizer for values in its range. Fused, they keep one byte, and the tensor between them is not written to
memory. Codes and gradients do not change.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn

from qat.fake_quantize.quantizer import ActivationQuantizer
from qat.graph.fx_network import is_relu


class FusedReluQuantizer(nn.Module):
    """``quantizer(relu(x))``; the quantizer is shared with the original network."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` of any shape to the same shape and type."""
        quantizer = self.quantizer
        output: Tensor = quantizer(F.relu(x)) if quantizer.passes else quantizer.fake_quantize_relu(x)
        return output


def fuse_relus(model: nn.Module) -> nn.Module:
    """``model`` with every ReLU fused into the quantizer that alone reads it. Shares all modules; not for export."""
    if not isinstance(model, fx.GraphModule):
        return model
    graph = fx.Graph()
    graph.output(graph.graph_copy(model.graph, {}))
    merged = fx.GraphModule(model, graph)
    for node in list(graph.find_nodes(op="call_module")):
        quantizer, relu = merged.get_submodule(str(node.target)), node.args[0]
        if isinstance(quantizer, ActivationQuantizer) and isinstance(relu, fx.Node) and _merges(relu, merged):
            path = f"rectified.{node.name}"
            merged.add_submodule(path, FusedReluQuantizer(quantizer))
            node.target = path
            node.replace_input_with(relu, relu.all_input_nodes[0])
            graph.erase_node(relu)
    merged.recompile()
    return merged


def _merges(node: fx.Node, model: fx.GraphModule) -> bool:
    """Whether it is a ReLU whose output and input have no other readers; an in-place ReLU changes its input."""
    alone = len(node.users) == 1 and len(node.all_input_nodes) == 1 and len(node.all_input_nodes[0].users) == 1
    return alone and is_relu(node, dict(model.named_modules()))
