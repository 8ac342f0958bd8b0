"""Simulation of networks of fewer than 8 bits, which no engine of this project computes: they cannot be exported.

As in the literature (Esser et al. 2020), the first and the last layer keep 8 bits, in weights and activations, and
tensors that hold no value below zero have codes 0 .. 2^bits - 1; others have those of two's complement, weights without
the lowest.
"""

from __future__ import annotations

from torch import fx, nn

from qat.artifact import UserError
from qat.fx_network import kind_of
from qat.operations import COMMUTING, POOLS
from qat.prepare import WEIGHT_QUANTIZERS, activation_quantizers, placement_of, weights_and_quantizers
from qat.quantizer import ActivationQuantizer, CodeRange
from qat.rectified import is_relu

BITS = 8


def check_bits(bits: int) -> None:
    """Raises UserError when so few or many bits are not simulated."""
    if not 2 <= bits <= BITS:
        raise UserError(f"--bits {bits} is out of range: give 2 to {BITS}; only {BITS} can be exported")


def simulate_bits(prepared: fx.GraphModule, bits: int) -> None:
    """Gives the quantizers of a prepared model, not calibrated yet, codes of ``bits`` bits; 8: those of INT8."""
    if bits == BITS:
        return
    half, whole = 2 ** (bits - 1), 2**bits
    placement, nodes = placement_of(prepared), {node.name: node for node in prepared.graph.nodes}
    layers = [decision.op for decision in placement.weights if decision.quantized]
    ends = {layers[0], layers[-1]} if layers else set()
    modules = dict(prepared.named_modules())
    spared = {id(_read_by(nodes[layer], prepared)) for layer in ends}
    weights = {f"{nodes[end].target}.weight_quantizer" for end in ends} | {f"{WEIGHT_QUANTIZERS}.{end}" for end in ends}
    for path, _, weight_quantizer in weights_and_quantizers(prepared):
        if path not in weights:
            weight_quantizer.codes = CodeRange(1 - half, half - 1)
    for name, quantizer in activation_quantizers(prepared).items():
        if id(quantizer) not in spared:
            made_by = [nodes[tensor.tensor] for tensor in placement.tensors if tensor.quantizer == name]
            rectified = all(_never_negative(node, prepared, modules) for node in made_by)
            quantizer.codes = CodeRange(0, whole - 1) if rectified else CodeRange(-half, half - 1)


def _read_by(node: fx.Node, prepared: fx.GraphModule) -> ActivationQuantizer | None:
    """The quantizer that ``node`` reads, through what only moves data."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node.op == "call_module":
            module = prepared.get_submodule(str(node.target))
            if isinstance(module, ActivationQuantizer):
                return module
    return None


def _never_negative(node: fx.Node, prepared: fx.GraphModule, modules: dict[str, nn.Module]) -> bool:
    """Whether ReLUs made all that ``node`` gives."""
    if is_relu(node, prepared):
        return True
    quantizes = node.op == "call_module" and isinstance(modules[str(node.target)], ActivationQuantizer)
    keeps_sign = quantizes or kind_of(node, modules) in (*COMMUTING, *POOLS, "concat")
    inputs = node.all_input_nodes
    return keeps_sign and bool(inputs) and all(_never_negative(made_by, prepared, modules) for made_by in inputs)
