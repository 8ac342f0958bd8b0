"""Hard rules about where scales lie, and where Q and DQ stand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from export.onnx_network import DEQUANTIZE, MOVING, QUANTIZE, constant
from export.qdq import (
    DATA,
    Q_DQ,
    SCALE,
    QdqModel,
    axis_of,
    code_readers,
    is_checked_at_quantizer,
    name_of,
    output_axis,
    quantizes_weight,
    size_of,
    weight_readers,
)
from export.rule import GUIDE, ONNX, RTX, HardRule


class PerTensorActivation(HardRule):
    """TensorRT-RTX computes what reads the tensor in float."""

    name = "per_tensor_activation"
    sentence = "an activation must have one scale for the whole tensor"
    source = GUIDE
    operators = Q_DQ

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """An activation with several scales."""
        count = size_of(model.value(node.inputs[SCALE]))
        if count > 1 and node.inputs[DATA] not in model.constants and not is_checked_at_quantizer(node, SCALE):
            yield f"an activation has {count} scales, so what reads it computes in float: use one for the tensor"


class ChannelAxis(HardRule):
    """TensorRT-RTX computes in float what reads a weight with scales along another axis.

    For ConvTranspose, TensorRT 10.2 and later need axis 1, and 8.4 to 10.0 need axis 0: one scale, as a vector of equal
    values along axis 1, suits both, because deploy.build moves it. TensorRT-RTX computes all in float.
    """

    name = "channel_axis"
    sentence = "the scales of a weight must lie along its output channels"
    source = GUIDE
    operators = (DEQUANTIZE,)

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """Scales of a weight along another axis; about an axis that does not exist see scale_count."""
        data = node.inputs[DATA]
        if data is None or data not in model.constants or size_of(model.value(node.inputs[SCALE])) < 2:
            return
        axis = axis_of(node, data)
        if data.shape is not None and not 0 <= axis < data.shape.rank():
            return
        quantize = data.producer()
        if quantize is not None and quantize.op_type == QUANTIZE and axis_of(quantize, data) != axis:
            yield (
                f"{name_of(quantize)} quantizes along axis {axis_of(quantize, data)}, it dequantizes along axis "
                f"{axis}: do both along the output channels"
            )
        for reader, along in weight_readers(node.outputs[0], axis):
            wanted, turned = output_axis(reader), "" if along == axis else f", which is axis {along} of what is read"
            if reader.op_type == "ConvTranspose" and reader.attributes.get_int("group", 1) > 1:
                grouped = f"a grouped transposed convolution ({name_of(reader)})"
                yield f"no axis of {grouped} is its output channels, and it has no known INT8 kernel: keep it in float"
            elif along != wanted:
                older = remedy = ""
                if reader.op_type == "ConvTranspose":
                    older = " (of TensorRT 8.4 to 10.0 axis 0)"
                    remedy = ", with one scale for all of them, which suits every version"
                yield (
                    f"scales along axis {axis}{turned}, but the output channels of {name_of(reader)} are axis {wanted}"
                    f"{older}, so it computes in float: quantize along the output channels{remedy}"
                )


class ScalarConstant(HardRule):
    """TensorRT-RTX reshapes a constant of no dimension before DequantizeLinear, and then refuses the reshape."""

    name = "scalar_constant"
    sentence = "a constant without dimensions must not be quantized"
    source = RTX
    operators = (DEQUANTIZE,)

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """A DQ of a scalar constant."""
        data = node.inputs[DATA]
        if data is not None and (codes := constant(data)) is not None and codes.ndim == 0:
            yield "it dequantizes a scalar constant, which TensorRT-RTX refuses: store it in float32"


class Pair(HardRule):
    """TensorRT-RTX passes codes through data movement, Relu and Clip; every other reader computes in float."""

    name = "pair"
    sentence = "every QuantizeLinear must have a DequantizeLinear"
    source = GUIDE
    operators = (QUANTIZE,)

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """Codes that something else reads, or nothing; about weights see direct_weight."""
        if node.inputs[DATA] in model.constants:
            return
        odd, found = code_readers(node.outputs[0])
        for reader in odd:
            yield (
                f"its codes are read by {reader.op_type} {name_of(reader)}: put a DequantizeLinear between, only that "
                "may read them"
            )
        if not found and not odd:
            yield "no DequantizeLinear reads its codes: add one, or remove it"


class SharedScale(HardRule):
    """Q by one scale and DQ by another multiplies. TensorRT computes exactly that, but it is hardly ever intended."""

    name = "shared_scale"
    sentence = "a Q and the DQ behind it should have the same scale"
    source = ONNX
    operators = (QUANTIZE,)
    severity = "warning"

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """A DQ by another scale than the Q before it."""
        scale = model.value(node.inputs[SCALE])
        for reader in node.outputs[0].consumers():
            other = model.value(reader.inputs[SCALE]) if reader.op_type == DEQUANTIZE else None
            if scale is None or other is None or scale.size != other.size:
                continue
            if not np.array_equal(scale.reshape(-1), other.reshape(-1), equal_nan=True):
                factor = float((other.reshape(-1) / scale.reshape(-1))[0])
                yield (
                    f"{name_of(reader)} dequantizes by another scale, so values return multiplied by {factor:.4g}: "
                    "use one scale for both"
                )


class DirectWeight(HardRule):
    """TensorRT 8.6 also refuses nodes between Q and DQ of a weight, and a Clip before Q, which TensorRT-RTX accepts.

    All of them compute data movement of a float weight when the engine is built.
    """

    name = "direct_weight"
    sentence = "only DequantizeLinear may read the codes of a weight"
    source = RTX

    def check(self, model: QdqModel, node: ir.Node) -> Iterator[str]:
        """A node that computes from constants, in front of the Q or DQ of a weight."""
        computed = all(value in model.constants for value in node.outputs)
        if node.op_type in Q_DQ or node.op_type == "Constant" or not computed:
            return
        uses = [use for value in node.outputs for use in value.uses()]
        for reader in [reader for reader, at in uses if reader.op_type in Q_DQ and at == DATA]:
            if reader.op_type == DEQUANTIZE or (quantizes_weight(reader) and node.op_type not in MOVING):
                where = "between a weight's codes and" if reader.op_type == DEQUANTIZE else "in front of"
                yield f"it stands {where} {name_of(reader)}, which TensorRT refuses: compute it now, store the result"


GRAPH_RULES = (
    PerTensorActivation(),
    ChannelAxis(),
    ScalarConstant(),
    Pair(),
    SharedScale(),
    DirectWeight(),
)
