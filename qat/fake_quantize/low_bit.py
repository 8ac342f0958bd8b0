"""Simulation of networks with fewer than 8 bits. No engine here can run them, so they cannot be exported.

As in the literature (Esser et al. 2020), the first and the last layer keep 8 bits for weights and activations. Tensors
that cannot be negative have the codes 0 .. 2^bits - 1; other tensors have two's complement codes, and weights the same
without the lowest code.
"""

from __future__ import annotations

from torch import fx, nn

from qat.base.errors import UserError
from qat.base.number_format import BITS, low_bit_format
from qat.fake_quantize.prepare import WEIGHT_QUANTIZERS, activation_quantizers, placement_of, weights_and_quantizers
from qat.fake_quantize.quantizer import ActivationQuantizer
from qat.graph.fx_network import function_name, kind_of
from qat.graph.operations import COMMUTING, POOLS

_NEVER_NEGATIVE = ("relu", "relu6", "sigmoid", "hardsigmoid")  # functions, and modules in lower case


def check_bits(bits: int) -> None:
    """Raises UserError when ``bits`` is not a number of bits that can be simulated."""
    if not 2 <= bits <= BITS:
        raise UserError(f"--bits {bits} is out of range: give 2 to {BITS}; only {BITS} can be exported")


def simulate_bits(prepared: fx.GraphModule, bits: int) -> None:
    """Gives the quantizers of a prepared, not yet calibrated model codes of ``bits`` bits; 8 keeps INT8."""
    if bits == BITS:
        return
    placement, nodes = placement_of(prepared), {node.name: node for node in prepared.graph.nodes}
    layers = placement.weights
    ends = {end.op for end in (layers[:1] + layers[-1:]) if end.quantized}
    modules = dict(prepared.named_modules())
    spared = {id(_read_by(nodes[end], modules)) for end in ends}
    weights = {f"{nodes[end].target}.weight_quantizer" for end in ends} | {f"{WEIGHT_QUANTIZERS}.{end}" for end in ends}
    for path, _, weight_quantizer in weights_and_quantizers(prepared):
        if path not in weights:
            weight_quantizer.format = low_bit_format(bits, signed=True).narrow()
    for name, quantizer in activation_quantizers(prepared).items():
        if id(quantizer) not in spared:
            made_by = [nodes[tensor.tensor] for tensor in placement.tensors if tensor.quantizer == name]
            rectified = all(_never_negative(node, modules) for node in made_by)
            quantizer.format = low_bit_format(bits, signed=not rectified)


def _read_by(node: fx.Node, modules: dict[str, nn.Module]) -> ActivationQuantizer | None:
    """The quantizer from which a quantized layer reads, through data movement at most; None if there is none."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node.op == "call_module":
            module = modules[str(node.target)]
            if isinstance(module, ActivationQuantizer):
                return module
    return None


def _never_negative(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether no value in the output of ``node`` can be negative, judging by the operations that made it."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    if (type(module).__name__ if module else function_name(node)).lower().rstrip("_") in _NEVER_NEGATIVE:
        return True
    kind, inputs = kind_of(node, modules), node.all_input_nodes
    of_two = kind in ("add", "multiply") and len(inputs) == 2  # not with a constant, which may be negative
    keeps_sign = of_two or kind in (*COMMUTING, *POOLS, "concat") or isinstance(module, ActivationQuantizer)
    return keeps_sign and bool(inputs) and all(_never_negative(made_by, modules) for made_by in inputs)
