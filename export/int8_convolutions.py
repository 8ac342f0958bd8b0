"""Questions about the INT8 convolutions of a folded network, for the rewriting of residual blocks."""

from __future__ import annotations

from torch import fx, nn

from export.fold import Dequantize, QuantizeDequantize
from qat.graph.fx_network import is_relu, kind_of


class Int8Convolutions:
    """The calls of a folded network (from export.fold.fold), and what each of them computes."""

    def __init__(self, folded: fx.GraphModule) -> None:
        self.modules = dict(folded.named_modules())
        self._called = [node.target for node in folded.graph.nodes if node.op == "call_module"]

    def convolution(self, node: fx.Node, *, grouped: bool = False) -> nn.Conv2d | None:
        """The INT8 convolution that ``node``, and no other node, calls; one with groups only where ``grouped``."""
        module = self.module(node)
        if not isinstance(module, nn.Conv2d) or not isinstance(getattr(module, "weight_quantizer", None), Dequantize):
            return None
        return module if (module.groups == 1 or grouped) and self._called.count(node.target) == 1 else None

    def is_quantizer(self, node: fx.Node) -> bool:
        """Whether ``node`` puts an activation on its INT8 grid."""
        return isinstance(self.module(node), QuantizeDequantize)

    def is_relu(self, node: fx.Node) -> bool:
        """Whether ``node`` clips at zero and does nothing else."""
        return is_relu(node, self.modules)

    def is_sum_of_two(self, node: fx.Node) -> bool:
        """Whether ``node`` adds two different tensors."""
        return kind_of(node, self.modules) == "add" and len(node.all_input_nodes) == 2

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None
