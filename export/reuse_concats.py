"""Concatenations that repeat an earlier one, as in DenseNets: they read its result instead of its inputs.

concat(a, b, c) after concat(a, b) becomes concat(concat(a, b), c), which is the same tensor. TensorRT 8.6 then writes
all of them into one buffer. Otherwise it copies each input for each concatenation that reads it: DenseNet-121 in FP16
has 192 layers instead of 778 (benchmarks/gpu_placement.txt).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from export.findings import LintFinding
from export.onnx_network import DEQUANTIZE, QUANTIZE
from qat.base.text import megabytes

REPEATED_CONCAT = "repeated_concat"
"""The name of the lint's rule."""


@dataclass(frozen=True)
class Repeat:
    """Inputs ``start`` to ``end`` of ``node`` are, in order, all inputs of the concatenation that made ``earlier``."""

    node: ir.Node
    start: int
    end: int
    earlier: ir.Value


def repeats(graph: ir.Graph) -> Iterator[Repeat]:
    """The longest repetition of each concatenation that has one. ``graph`` must be sorted; it may have Q/DQ nodes."""
    made: dict[tuple[int, tuple[ir.Value | None, ...]], ir.Value] = {}
    for node in graph:
        if node.op_type == "Concat":
            axis, inputs = node.attributes["axis"].as_int(), tuple(node.inputs)
            lengths = range(len(inputs) - 1, 1, -1)
            runs = ((start, start + length) for length in lengths for start in range(len(inputs) - length + 1))
            if found := next(((start, end) for start, end in runs if (axis, inputs[start:end]) in made), None):
                start, end = found
                yield Repeat(node, start, end, made[axis, inputs[start:end]])
            made[axis, inputs] = _quantized_result(node)


def reuse_concats(graph: ir.Graph) -> None:
    """Removes all repetitions, in place."""
    while found := list(repeats(graph)):
        for repeat in found:
            inputs = tuple(repeat.node.inputs)
            shorter = (*inputs[: repeat.start], repeat.earlier, *inputs[repeat.end :])
            for index, value in enumerate(shorter):
                repeat.node.replace_input_with(index, value)
            repeat.node.resize_inputs(len(shorter))


def repeat_findings(graph: ir.Graph) -> Iterator[LintFinding]:
    """A finding for each concatenation that repeats an earlier one."""
    for repeat in repeats(graph):
        again = repeat.node.inputs[repeat.start : repeat.end]
        size = sum(map(_bytes_per_image, again))
        cost = f", {megabytes(size, 1)} for each image" if size else ""
        whole = repeat.earlier.name
        message = f"{len(again)} of its inputs make up {whole} already: TensorRT copies them once more{cost}"
        yield LintFinding(repeat.node.name or "", REPEATED_CONCAT, message, "warning", size)


def _quantized_result(concat: ir.Node) -> ir.Value:
    """The result of ``concat``, behind Q and DQ if there are some with the scale that all inputs have."""
    result = concat.outputs[0]
    scales = {_scale(value) for value in concat.inputs}
    for quantize, _ in result.uses():
        if quantize.op_type == QUANTIZE and {quantize.inputs[1]} == scales:
            for reader, _ in quantize.outputs[0].uses():
                if reader.op_type == DEQUANTIZE:
                    return reader.outputs[0]
    return result


def _scale(value: ir.Value | None) -> ir.Value | None:
    """The scale of the DQ that makes ``value``, if one does."""
    producer = value.producer() if value is not None else None
    return producer.inputs[1] if producer is not None and producer.op_type == DEQUANTIZE else None


def _bytes_per_image(value: ir.Value | None) -> int:
    """The size of ``value`` for one image: in INT8 if a DQ makes it, else in FP16; 0 if the shape is not known."""
    elements = 1
    for extent in value.shape[1:] if value is not None and value.shape is not None else (0,):
        elements *= extent if isinstance(extent, int) else 0
    return elements * (1 if _scale(value) is not None else 2)
