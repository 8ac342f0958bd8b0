"""Hard rules about scales: their values, their number, their type, and the operator set that has them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from export.onnx_network import QUANTIZE, WEIGHTED
from export.qdq import (
    DATA,
    HALF_TYPES,
    Q_DQ,
    SCALE,
    QdqModel,
    axis_of,
    is_checked_at_quantizer,
    is_made_by_integer_operator,
    name_of,
)
from export.rule import GUIDE, ONNX, PARSER, RTX, HardRule

PER_CHANNEL_OPSET, HALF_SCALE_OPSET = 13, 19
SMALLEST_HALF = float(np.finfo(np.float16).tiny)
"""Float16 below it, 6.1e-5, has fewer bits, and kernels may take it for zero."""
_FLOAT_TYPES = (ir.DataType.FLOAT, *HALF_TYPES)


class Opset(HardRule):
    """Found once in a model, at the first node. TensorRT-RTX accepts both in older operator sets too."""

    name = "opset"
    sentence = "the operator set must be at least 13 for several scales, and at least 19 for 16-bit scales"
    source = ONNX
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """The scales that the model's operator set does not have."""
        for what, found, needed in (
            ("several scales", model.nodes_with_several_scales, PER_CHANNEL_OPSET),
            ("16-bit scales", model.nodes_with_half_scales, HALF_SCALE_OPSET),
        ):
            if found and node is found[0] and model.opset < needed:
                more = f", here and at {len(found) - 1} more nodes" if len(found) > 1 else ""
                yield f"{what}{more}: operator set {model.opset} has none, export with {needed} or later"


class ConstantScale(HardRule):
    """TensorRT-RTX crashes on a scale that depends on the input."""

    name = "constant_scale"
    sentence = "a scale must be a constant when the engine is built"
    source = GUIDE
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """A scale that is computed from the network's input."""
        scale = node.inputs[SCALE]
        known = scale in model.constants or is_made_by_integer_operator(scale) or is_checked_at_quantizer(node, SCALE)
        if not known:
            yield "the scale depends on the network's input: calibrate, and store it as an initializer"


class PositiveScale(HardRule):
    """The parser: "Scale coefficients must all be positive". TensorRT-RTX accepts infinity; then all codes are zero."""

    name = "positive_scale"
    sentence = "every scale must be positive and finite"
    source = PARSER
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """Scales that are zero, negative, infinite or NaN."""
        scale = model.value(node.inputs[SCALE])
        if scale is None or is_checked_at_quantizer(node, SCALE):
            return
        bad = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
        if not bad.size:
            return
        if scale.size == 1:
            yield f"its scale is {scale.reshape(-1)[0]}, not positive and finite: floor it to a small positive number"
        else:
            yield (
                f"{bad.size} of {scale.size} scales are not positive and finite, first at channel {bad[0]}, which a "
                "dead channel causes: floor them to a small positive number"
            )


class ScaleCount(HardRule):
    """One scale for each index of the axis, in a vector."""

    name = "scale_count"
    sentence = "a tensor has one scale, or one scale for each channel"
    source = PARSER
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """Scales of another shape than the axis has."""
        scale, data = model.value(node.inputs[SCALE]), node.inputs[DATA]
        if scale is None or scale.size == 1 or is_checked_at_quantizer(node, SCALE):
            return
        if scale.ndim != 1:
            yield (
                f"scales of shape {list(scale.shape)}, in blocks: {model.format.name} has one scale for a tensor or "
                "one for each channel"
            )
        elif data is not None and data.shape is not None:
            axis, rank = axis_of(node, data), data.shape.rank()
            if not 0 <= axis < rank:
                yield f"scales along axis {axis} of a tensor of {rank} dimensions: correct the axis"
            elif isinstance(extent := data.shape[axis], int) and extent != scale.size:
                yield f"{scale.size} scales for {extent} channels along axis {axis}: give one scale for each channel"


class ScalarScale(HardRule):
    """TensorRT-RTX takes a vector of one scale for scales along an axis, and what reads the activation is in float.

    For weights it accepts such a vector. The parser accepts it for both.
    """

    name = "scalar_scale"
    sentence = "the scale of an activation must be a scalar, not a vector of one element"
    source = RTX
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """A vector of one scale at an activation."""
        scale = model.value(node.inputs[SCALE])
        if scale is None or scale.size != 1 or scale.ndim == 0 or is_checked_at_quantizer(node, SCALE):
            return
        if node.inputs[DATA] not in model.constants:
            shape = list(scale.shape)
            yield f"the scale has shape {shape}, so TensorRT-RTX computes what reads it in float: make it a scalar"


class ScaleType(HardRule):
    """TensorRT-RTX refuses a layer if its inputs then differ in type."""

    name = "scale_type"
    sentence = "a 16-bit scale must have the type of its tensor"
    source = GUIDE
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """A 16-bit scale beside tensors of another type."""
        scale = model.dtype(node.inputs[SCALE])
        if scale not in HALF_TYPES or is_checked_at_quantizer(node, SCALE):
            return
        if node.op_type == QUANTIZE:
            beside = [(model.dtype(node.inputs[DATA]), "the tensor")]
        else:
            readers = [reader for reader in node.outputs[0].consumers() if reader.op_type in WEIGHTED]
            beside = [
                (model.dtype(value), f"an input of {name_of(reader)}") for reader in readers for value in reader.inputs
            ]
        for dtype, what in dict.fromkeys(beside):
            if dtype in _FLOAT_TYPES and dtype != scale:
                yield f"its scale is {scale}, {what} is {dtype}: store the scale in {dtype}"


class HalfScaleRange(HardRule):
    """Float16 has at most 10 bits, and fewer below 6.1e-5. TensorRT-RTX accepts such scales."""

    name = "half_scale_range"
    sentence = "a float16 scale must be at least 6.1e-5, below which float16 loses bits"
    source = ONNX
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """Float16 scales that are too small."""
        if model.dtype(node.inputs[SCALE]) != ir.DataType.FLOAT16 or is_checked_at_quantizer(node, SCALE):
            return
        scale = model.value(node.inputs[SCALE])
        small = np.zeros(0) if scale is None else scale[(scale > 0) & (scale < SMALLEST_HALF)]
        if small.size:
            yield (
                f"{small.size} float16 scales are below {SMALLEST_HALF:.1e}, the least {small.min():.1e}, where "
                "float16 loses bits: store scales in float32"
            )


SCALE_RULES = (
    Opset(),
    ConstantScale(),
    PositiveScale(),
    ScaleCount(),
    ScalarScale(),
    ScaleType(),
    HalfScaleRange(),
)
