"""Makes a tensor of a Q/DQ network a multiple of what it was, by multiplying constants: scales and biases alone.

What computes the tensor has to make the multiple, or what reads it has to take the factor back. Both stay exact but for
the rounding of the scales: codes of activations and weights are the same.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.names import all_names, unused_name
from export.onnx_network import DEQUANTIZE, QUANTIZE, WEIGHT, WEIGHTED, constant

_SCALE, _BIAS = 1, 2
_MOVERS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")
# f(c * x) is c * f(x), for any c > 0.
_HOMOGENEOUS = (*_MOVERS, "Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean")
_SMALLEST = float(np.finfo(np.float32).tiny)  # the scale of a channel of zeros may be as small as that already


class Scaling:
    """Collects what is to be multiplied. Nothing changes before ``apply``, and nothing at all if a step fails."""

    def __init__(self) -> None:
        self._factors: dict[tuple[ir.Node, int], float] = {}

    def make(self, value: ir.Value | None, factor: float, reader: ir.Node) -> bool:
        """Makes ``value`` as ``reader`` reads it ``factor`` times as large; other readers take that back.

        False if that takes more than constants.
        """
        node = value.producer() if value is not None and not value.is_graph_output() else None
        if node is None or value is None:
            return False
        others = [use for use in value.uses() if use.node is not reader]
        return self._computes(node, factor) and all(self._takes_back(use, 1 / factor) for use in others)

    def take_back(self, value: ir.Value, factor: float) -> bool:
        """Makes what reads ``value`` compute as if it were ``factor`` times as large; False as in ``make``."""
        return not value.is_graph_output() and all(self._takes_back(use, factor) for use in value.uses())

    def multiply(self, node: ir.Node, at: int, factor: float) -> bool:
        """Multiplies input ``at`` of ``node``, if it is a constant."""
        self._factors[node, at] = self._factors.get((node, at), 1.0) * factor
        return constant(node.inputs[at]) is not None

    def apply(self, graph: ir.Graph, smallest: float) -> bool:
        """Does all that; False, and nothing, if a scale became less than ``smallest``."""
        stored: dict[tuple[str | None, float], ir.Value] = {}
        made: dict[tuple[ir.Node, int], np.ndarray] = {}
        for (node, at), factor in self._factors.items():
            values = constant(node.inputs[at])
            assert values is not None
            made[node, at] = values * values.dtype.type(factor)
            if node.op_type in (QUANTIZE, DEQUANTIZE):
                as_stored = values.dtype.type  # NumPy 1 would compute and compare one number in float64
                if made[node, at].min() < as_stored(smallest):
                    return False
                made[node, at] = np.maximum(made[node, at], np.asarray(_SMALLEST, values.dtype))
        names = all_names(graph)
        for (node, at), values in made.items():
            given = node.inputs[at]
            assert given is not None
            key = (given.name, self._factors[node, at])
            if key not in stored:
                name = unused_name(f"{given.name}.scaled", names)
                names.add(name)
                stored[key] = ir.Value(name=name, const_value=ir.tensor(values, name=name))
                stored[key].type, stored[key].shape = given.type, given.shape
                graph.register_initializer(stored[key])
            node.replace_input_with(at, stored[key])
        return True

    def _computes(self, node: ir.Node, factor: float) -> bool:
        """Makes the output of ``node`` ``factor`` times as large."""
        if node.op_type in WEIGHTED:
            has_bias = len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None
            plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
            return plain and self._weighs(node, factor) and (not has_bias or self.multiply(node, _BIAS, factor))
        if node.op_type == "Add" and (at := _bias_of(node)) is not None:
            return self.multiply(node, at, factor) and self.make(node.inputs[1 - at], factor, node)
        if node.op_type in _HOMOGENEOUS:
            return self.make(node.inputs[0], factor, node)
        quantize = node.inputs[0].producer() if node.op_type == DEQUANTIZE and node.inputs[0] is not None else None
        if quantize is None or quantize.op_type != QUANTIZE:
            return False
        return self._codes_of(quantize, factor, node) and self.make(quantize.inputs[0], factor, quantize)

    def _takes_back(self, use: tuple[ir.Node, int], factor: float) -> bool:
        """Makes a reader compute as if what it reads were ``factor`` times as large."""
        node, at = use
        if at != 0:
            return False
        if node.op_type in WEIGHTED:
            return self._weighs(node, factor)
        if node.op_type in _HOMOGENEOUS:
            return self.take_back(node.outputs[0], factor)
        return node.op_type == QUANTIZE and self._codes_of(node, 1 / factor)

    def _codes_of(self, quantize: ir.Node, factor: float, reader: ir.Node | None = None) -> bool:
        """Keeps the codes of what became ``factor`` times as large; all readers but the DQ ``reader`` take it back."""
        done = self.multiply(quantize, _SCALE, factor) and not quantize.outputs[0].is_graph_output()
        for dequantize in quantize.outputs[0].consumers():
            if dequantize.op_type != DEQUANTIZE:
                return False
            done = done and self.multiply(dequantize, _SCALE, factor)
            done = done and (dequantize is reader or self.take_back(dequantize.outputs[0], 1 / factor))
        return done

    def _weighs(self, layer: ir.Node, factor: float) -> bool:
        """Multiplies the scales of the layer's weight, if it has codes and is its own."""
        dequantize = _only_producer(layer.inputs[WEIGHT])
        if dequantize is not None and dequantize.op_type == "Transpose":
            dequantize = _only_producer(dequantize.inputs[0])
        if dequantize is None or dequantize.op_type != DEQUANTIZE or constant(dequantize.inputs[0]) is None:
            return False
        return self.multiply(dequantize, _SCALE, factor)


def _bias_of(node: ir.Node) -> int | None:
    """Which input of an addition is a vector of constants."""
    values = (constant(value) for value in node.inputs)
    return next((at for at, found in enumerate(values) if found is not None and found.ndim == 1), None)


def _only_producer(value: ir.Value | None) -> ir.Node | None:
    """What makes a value that nothing else reads."""
    return None if value is None or len(value.uses()) > 1 else value.producer()
