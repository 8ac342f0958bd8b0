"""TensorRT's hard rules for Q/DQ networks, checked on an ONNX model; each finding names its node.

Source: NVIDIA TensorRT Developer Guide, "Working with Quantized Types", and the ONNX parser's operator notes for
QuantizeLinear and DequantizeLinear. A model with findings is refused by TensorRT, or computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from export.findings import Finding
from export.onnx_network import constant

FORBIDDEN = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FIRST_PER_CHANNEL_OPSET = 13


def hard_findings(model: ir.Model) -> list[Finding]:
    """All broken rules in ``model``, in the order of its nodes; [] when TensorRT's rules hold."""
    findings = list(_opset(model))
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for rule in (_scale, _zero_point, _granularity):
                findings.extend(rule(node))
        if node.op_type == "QuantizeLinear":
            findings.extend(_pair(node))
        if node.op_type in FORBIDDEN:
            message = (
                f"{node.op_type} is not supported: use QuantizeLinear and DequantizeLinear around float operations"
            )
            findings.append(Finding(_name(node), "forbidden_op", message))
        if node.op_type in WEIGHTED:
            findings.extend(_float_bias(node))
    return findings


def _opset(model: ir.Model) -> Iterator[Finding]:
    opset = model.opset_imports.get("", 0)
    if opset < FIRST_PER_CHANNEL_OPSET:
        message = f"opset {opset}, per-channel scales need {FIRST_PER_CHANNEL_OPSET} or later: export again"
        yield Finding("model", "opset", message)


def _scale(node: ir.Node) -> Iterator[Finding]:
    scale = constant(node.inputs[1])
    if scale is None:
        yield Finding(_name(node), "constant_scale", "the scale is not a constant: make it an initializer")
    elif not np.isfinite(scale).all() or (scale <= 0).any():
        bad = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
        message = (
            f"{bad.size} of {scale.size} scales are not positive and finite, first at channel {bad[0]}: floor them"
        )
        yield Finding(_name(node), "positive_scale", message)


def _zero_point(node: ir.Node) -> Iterator[Finding]:
    given = node.inputs[2] if len(node.inputs) > 2 else None
    if given is None:
        yield Finding(_name(node), "explicit_zero_point", "no zero point, so UINT8: add INT8 zeros as an initializer")
        return
    zero_point = constant(given)
    if zero_point is None:
        yield Finding(
            _name(node),
            "constant_zero_point",
            "the zero point is not an initializer: remove what lies between",
        )
    elif zero_point.dtype != np.int8:
        yield Finding(_name(node), "int8_zero_point", f"the zero point is {zero_point.dtype}: quantize to INT8")
    elif zero_point.any():
        yield Finding(_name(node), "symmetric", "the zero point is not zero: quantize symmetrically")


def _granularity(node: ir.Node) -> Iterator[Finding]:
    """Activations per tensor; per channel only for constants, along the output channels."""
    scale, data = constant(node.inputs[1]), node.inputs[0]
    if scale is None or scale.size <= 1 or data is None:
        return
    producer = data.producer()
    root = producer.inputs[0] if producer is not None and producer.op_type == "QuantizeLinear" else data
    if root is None or constant(root) is None:
        yield Finding(_name(node), "per_tensor_activation", "an activation has several scales: use one a tensor")
        return
    axis = node.attributes.get_int("axis", 1)
    for reader in node.outputs[0].consumers():
        wanted = _channel_axis(reader)
        if wanted is not None and axis != wanted:
            message = f"scales along axis {axis}, the output channels of {_name(reader)} are axis {wanted}"
            yield Finding(_name(node), "channel_axis", message)


def _channel_axis(reader: ir.Node) -> int | None:
    match reader.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if reader.attributes.get_int("transB", 0) else 1
    return None


def _pair(quantize: ir.Node) -> Iterator[Finding]:
    """Q and DQ of one tensor share scale and zero point."""
    for reader in quantize.outputs[0].consumers():
        if reader.op_type != "DequantizeLinear":
            message = f"its codes are read by {reader.op_type} {_name(reader)}: only DequantizeLinear may read them"
            yield Finding(_name(quantize), "pair", message)
        elif reader.inputs[1] is not quantize.inputs[1]:
            yield Finding(_name(quantize), "shared_scale", f"{_name(reader)} dequantizes it with another scale tensor")


def _float_bias(node: ir.Node) -> Iterator[Finding]:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (producer := bias.producer()) is not None and producer.op_type == "DequantizeLinear":
        yield Finding(_name(node), "float_bias", f"its bias comes from {_name(producer)}: keep the bias in float")


def _name(node: ir.Node) -> str:
    return node.name or node.op_type
