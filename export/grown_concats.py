"""Concatenations that repeat an earlier one, as in DenseNets: they take its result instead of all its inputs.

concat(a, b, c) after concat(a, b) becomes concat(concat(a, b), c), which is the same tensor. TensorRT then lets all of
them grow in one buffer, where it would copy each input for each concatenation that reads it: 116 inputs instead of 593
in DenseNet-121.
"""

from __future__ import annotations

import onnx_ir as ir

from export.onnx_network import DEQUANTIZE, QUANTIZE


def take_earlier_concats(graph: ir.Graph) -> int:
    """Rewrites the concatenations of a sorted float or Q/DQ graph; returns how many inputs they have less."""
    made: dict[tuple[int, tuple[ir.Value | None, ...]], ir.Value] = {}
    saved = 0
    for node in graph:
        if node.op_type != "Concat":
            continue
        axis, inputs = node.attributes["axis"].as_int(), tuple(node.inputs)
        for length in range(len(inputs) - 1, 1, -1):
            runs = [(start, start + length) for start in range(len(inputs) - length + 1)]
            if found := [(start, end) for start, end in runs if (axis, inputs[start:end]) in made]:
                start, end = found[0]
                shorter = (*inputs[:start], made[axis, inputs[start:end]], *inputs[end:])
                for index, value in enumerate(shorter):
                    node.replace_input_with(index, value)
                node.resize_inputs(len(shorter))
                saved += len(inputs) - len(shorter)
                break
        made[axis, inputs] = _as_the_inputs(node)
    return saved


def _as_the_inputs(concat: ir.Node) -> ir.Value:
    """The result as readers of the inputs would read it: behind Q and DQ of the inputs' scale, where there are some."""
    result = concat.outputs[0]
    scales = {_scale(value) for value in concat.inputs}
    for quantize, _ in result.uses():
        if quantize.op_type == QUANTIZE and {quantize.inputs[1]} == scales:
            for reader, _ in quantize.outputs[0].uses():
                if reader.op_type == DEQUANTIZE:
                    return reader.outputs[0]
    return result


def _scale(value: ir.Value | None) -> ir.Value | None:
    """That of the DQ which makes ``value``."""
    producer = value.producer() if value is not None else None
    return producer.inputs[1] if producer is not None and producer.op_type == DEQUANTIZE else None
