"""TensorRT's hard rules for Q/DQ networks, checked on an ONNX model: a broken one is refused, or computed otherwise.

Every rule is one function, named as in its findings, which yields what is wrong with one node in plain words. Sources:
- GUIDE: NVIDIA TensorRT Developer Guide, "Working with Quantized Types" and "Explicit Quantization";
- PARSER: NVIDIA's ONNX parser (onnx-tensorrt, QuantDequantLinearHelper), as of TensorRT 9 and of 10.11;
- RTX: what TensorRT-RTX 1.7 does with the fault (tests/export/test_lint.py builds it);
- ONNX: the operators' own definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from export.findings import LintFinding, Severity
from export.onnx_network import DEQUANTIZE, MOVING, QUANTIZE, WEIGHTED, constant, constants
from export.qdq import (
    BIAS,
    DATA,
    Q_DQ,
    SCALE,
    ZERO_POINT,
    QdqModel,
    as_its_quantizer,
    axis_of,
    code_readers,
    code_type,
    input_of,
    is_integer_operator,
    made_by_integer_operator,
    name_of,
    output_axis,
    quantizes_weight,
    size_of,
    weight_readers,
)

PER_CHANNEL_OPSET, HALF_SCALE_OPSET = 13, 19
SMALLEST_HALF = float(np.finfo(np.float16).tiny)
"""Float16 below it, 6.1e-5, has fewer bits, and kernels may take it for zero."""
_HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOAT_TYPES = (ir.DataType.FLOAT, *_HALF_TYPES)

Check = Callable[[QdqModel, ir.Node], Iterator[str]]
_CHECKS: list[tuple[tuple[str, ...], Severity, Check]] = []


def _rule(*operators: str, severity: Severity = "error") -> Callable[[Check], Check]:
    """Has the decorated rule asked about every node of these operators; of all operators if none is named."""

    def record(check: Check) -> Check:
        _CHECKS.append((operators, severity, check))
        return check

    return record


def hard_findings(model: ir.Model) -> list[LintFinding]:
    """All broken rules in ``model``, in the order of its nodes; [] when TensorRT's rules hold."""
    graph = QdqModel(model.opset_imports.get("", 0), constants(model.graph))
    return list(_opset(graph, model)) + [
        LintFinding(name_of(node), check.__name__, message, severity)
        for node in model.graph.all_nodes()
        for operators, severity, check in _CHECKS
        if not operators or node.op_type in operators
        for message in check(graph, node)
    ]


def _opset(graph: QdqModel, model: ir.Model) -> Iterator[LintFinding]:
    """ONNX: an axis exists from 13 on, 16-bit scales from 19 on. RTX takes both in older operator sets, too."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type in Q_DQ]
    per_channel = [node for node in nodes if size_of(graph.value(node.inputs[SCALE])) > 1]
    half = [node for node in nodes if graph.dtype(node.inputs[SCALE]) in _HALF_TYPES]
    for what, found, needed in (
        ("several scales", per_channel, PER_CHANNEL_OPSET),
        ("16-bit scales", half, HALF_SCALE_OPSET),
    ):
        if found and graph.opset < needed:
            more = f", here and at {len(found) - 1} more nodes" if len(found) > 1 else ""
            message = f"{what}{more}: operator set {graph.opset} has none, export with {needed} or later"
            yield LintFinding(name_of(found[0]), "opset", message)


# --- scales -----------------------------------------------------------------------------------------------------------


@_rule(*Q_DQ)
def constant_scale(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """GUIDE: a scale must be a build-time constant. RTX crashes on one that depends on the input."""
    scale = node.inputs[SCALE]
    if scale not in graph.constants and not made_by_integer_operator(scale) and not as_its_quantizer(node, SCALE):
        yield "the scale depends on the network's input: calibrate, and store it as an initializer"


@_rule(*Q_DQ)
def positive_scale(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """PARSER: "Scale coefficients must all be positive". RTX takes infinity, whose codes are all zero."""
    scale = graph.value(node.inputs[SCALE])
    if scale is None or as_its_quantizer(node, SCALE):
        return
    bad = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
    if not bad.size:
        return
    if scale.size == 1:
        yield f"its scale is {scale.reshape(-1)[0]}, not positive and finite: floor it to a small positive number"
    else:
        yield (
            f"{bad.size} of {scale.size} scales are not positive and finite, first at channel {bad[0]}, which a dead "
            "channel causes: floor them to a small positive number"
        )


@_rule(*Q_DQ)
def scale_count(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """PARSER: as many scales as indices of the axis, in one dimension."""
    scale, data = graph.value(node.inputs[SCALE]), node.inputs[DATA]
    if scale is None or scale.size == 1 or as_its_quantizer(node, SCALE):
        return
    if scale.ndim != 1:
        yield f"scales of shape {list(scale.shape)}, in blocks: INT8 has one for a tensor or one for a channel"
    elif data is not None and data.shape is not None:
        axis, rank = axis_of(node, data), data.shape.rank()
        if not 0 <= axis < rank:
            yield f"scales along axis {axis} of a tensor of {rank} dimensions: correct the axis"
        elif isinstance(extent := data.shape[axis], int) and extent != scale.size:
            yield f"{scale.size} scales for {extent} channels along axis {axis}: one is needed for each"


@_rule(*Q_DQ)
def scalar_scale(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """RTX takes a vector of one scale for scales along an axis, and what reads the activation computes in float.

    Of weights it takes one; PARSER takes both.
    """
    scale = graph.value(node.inputs[SCALE])
    if scale is None or scale.size != 1 or scale.ndim == 0 or as_its_quantizer(node, SCALE):
        return
    if node.inputs[DATA] not in graph.constants:
        shape = list(scale.shape)
        yield f"the scale has shape {shape}, so TensorRT-RTX computes what reads it in float: make it a scalar"


@_rule(*Q_DQ)
def scale_type(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """GUIDE: a 16-bit scale must have its tensor's type. RTX refuses a layer whose inputs then differ in type."""
    scale = graph.dtype(node.inputs[SCALE])
    if scale not in _HALF_TYPES or as_its_quantizer(node, SCALE):
        return
    if node.op_type == QUANTIZE:
        beside = [(graph.dtype(node.inputs[DATA]), "the tensor")]
    else:
        readers = [reader for reader in node.outputs[0].consumers() if reader.op_type in WEIGHTED]
        beside = [
            (graph.dtype(value), f"an input of {name_of(reader)}") for reader in readers for value in reader.inputs
        ]
    for dtype, what in dict.fromkeys(beside):
        if dtype in _FLOAT_TYPES and dtype != scale:
            yield f"its scale is {scale}, {what} is {dtype}: store the scale in {dtype}"


@_rule(*Q_DQ)
def half_scale_range(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """ONNX: float16 has no more than 10 bits, fewer below 6.1e-5. RTX takes such scales."""
    if graph.dtype(node.inputs[SCALE]) != ir.DataType.FLOAT16 or as_its_quantizer(node, SCALE):
        return
    scale = graph.value(node.inputs[SCALE])
    small = np.zeros(0) if scale is None else scale[(scale > 0) & (scale < SMALLEST_HALF)]
    if small.size:
        yield (
            f"{small.size} float16 scales are below {SMALLEST_HALF:.1e}, the least {small.min():.1e}, where float16 "
            "loses its bits: store scales in float32"
        )


# --- zero points and types of codes -----------------------------------------------------------------------------------


@_rule(QUANTIZE)
def explicit_zero_point(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """ONNX: without a zero point and an output_dtype codes are UINT8. PARSER, RTX: they are INT8 all the same."""
    if input_of(node, ZERO_POINT) is None and not node.attributes.get_int("output_dtype", 0):
        yield "no zero point, which means UINT8 in ONNX and INT8 in TensorRT: add INT8 zeros as an initializer"


@_rule(*Q_DQ)
def constant_zero_point(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """PARSER of 9: only an initializer or a Constant becomes the float zero point that TensorRT wants.

    That of 10.11, and RTX, look through Identity and Cast, and through nothing else.
    """
    given = input_of(node, ZERO_POINT)
    if given is None or constant(given) is not None or as_its_quantizer(node, ZERO_POINT):
        return
    if made_by_integer_operator(given):
        return  # see forbidden_op
    maker = given.producer()
    through = f"{maker.op_type} {name_of(maker)}" if maker is not None else "the network's input"
    yield f"its zero point comes through {through}, which TensorRT 9 and older refuse: make it an initializer"


@_rule(*Q_DQ)
def symmetric(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """PARSER: "TensorRT only supports symmetric quantization"."""
    zero_point = graph.value(input_of(node, ZERO_POINT))
    if zero_point is None or not zero_point.any() or as_its_quantizer(node, ZERO_POINT):
        return
    if code_type(graph, node) in (ir.DataType.INT8, None):
        worst = zero_point.reshape(-1)[np.argmax(zero_point != 0)]
        yield f"its zero point is {worst}, and TensorRT's INT8 is symmetric: quantize again with zero point 0"


@_rule(*Q_DQ)
def zero_point_shape(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """PARSER: "The scale and zero point must have the same volume"."""
    scale, zero_point = graph.value(node.inputs[SCALE]), graph.value(input_of(node, ZERO_POINT))
    if scale is None or zero_point is None or scale.size == zero_point.size:
        return
    if not (as_its_quantizer(node, SCALE) and as_its_quantizer(node, ZERO_POINT)):
        yield f"{scale.size} scales, but {zero_point.size} zero points: one is needed for each scale"


@_rule(*Q_DQ)
def int8_codes(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """PARSER, RTX: UINT8 codes are refused, or read as INT8 with a warning; 16 bits are refused."""
    codes = code_type(graph, node)
    if codes in (ir.DataType.INT8, None) or (node.op_type == DEQUANTIZE and codes == ir.DataType.INT32):
        return  # INT32: see float_bias
    zero_point = graph.value(input_of(node, ZERO_POINT))
    if codes == ir.DataType.UINT8:
        shifted = f" with zero point {zero_point.reshape(-1)[0]}" if zero_point is not None and zero_point.any() else ""
        yield (
            f"its codes are UINT8{shifted}, which TensorRT refuses, or takes for INT8, so that those above 127 "
            "saturate: quantize again to INT8 with zero point 0"
        )
    else:
        yield f"its codes are {codes}, which is not INT8: quantize to INT8, or leave it in float"


@_rule(DEQUANTIZE)
def float_bias(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """GUIDE: a bias is not quantized. RTX refuses one in INT32; one in INT8, which it takes, keeps 8 bits of it."""
    readers = [
        reader
        for reader, position in node.outputs[0].uses()
        if position == BIAS and reader.op_type in WEIGHTED and node.inputs[DATA] in graph.constants
    ]
    codes = code_type(graph, node)
    if readers or codes == ir.DataType.INT32:
        what = f"the bias of {', '.join(map(name_of, readers))}" if readers else "a constant"
        yield f"it dequantizes {what} from {codes or 'codes'}: TensorRT adds biases in float, so store it in float32"


# --- granularity ------------------------------------------------------------------------------------------------------


@_rule(*Q_DQ)
def per_tensor_activation(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """GUIDE: activations have one scale. RTX computes what reads the tensor in float."""
    scale = graph.value(node.inputs[SCALE])
    if size_of(scale) > 1 and node.inputs[DATA] not in graph.constants and not as_its_quantizer(node, SCALE):
        yield f"an activation has {size_of(scale)} scales, so what reads it computes in float: use one for the tensor"


@_rule(DEQUANTIZE)
def channel_axis(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """GUIDE: scales of weights lie along the output channels. RTX computes in float where they do not.

    Of ConvTranspose, 10.2 and later want axis 1, 8.4 to 10.0 axis 0; RTX computes both in float.
    """
    data = node.inputs[DATA]
    if data is None or data not in graph.constants or size_of(graph.value(node.inputs[SCALE])) < 2:
        return
    axis = axis_of(node, data)
    if data.shape is not None and not 0 <= axis < data.shape.rank():
        return  # see scale_count
    quantize = data.producer()
    if quantize is not None and quantize.op_type == QUANTIZE and axis_of(quantize, data) != axis:
        yield f"{name_of(quantize)} quantizes along axis {axis_of(quantize, data)}, it dequantizes along axis {axis}"
    for reader, along in weight_readers(node.outputs[0], axis):
        wanted, turned = output_axis(reader), "" if along == axis else f", which is axis {along} of what is read"
        if reader.op_type == "ConvTranspose" and reader.attributes.get_int("group", 1) > 1:
            grouped = f"a grouped transposed convolution ({name_of(reader)})"
            yield f"no axis of {grouped} is its output channels: use one scale"
        elif along != wanted:
            older = " (of TensorRT 8.4 to 10.0 axis 0)" if reader.op_type == "ConvTranspose" else ""
            yield (
                f"scales along axis {axis}{turned}, but the output channels of {name_of(reader)} are axis {wanted}"
                f"{older}, so it computes in float: quantize along the output channels"
            )


@_rule(DEQUANTIZE)
def scalar_constant(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """RTX reshapes a constant of no dimension before DequantizeLinear, and then refuses what stands between the two."""
    data = node.inputs[DATA]
    if data is not None and (codes := constant(data)) is not None and codes.ndim == 0:
        yield "it dequantizes a scalar constant, which TensorRT-RTX refuses: store it in float32"


# --- what stands around Q and DQ --------------------------------------------------------------------------------------


@_rule(QUANTIZE)
def pair(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """GUIDE: every Q has its DQ. RTX passes codes through data movement, Relu and Clip; all else reads float."""
    if node.inputs[DATA] in graph.constants:
        return  # see direct_weight
    odd, found = code_readers(node.outputs[0])
    for reader in odd:
        yield f"its codes are read by {reader.op_type} {name_of(reader)}: only DequantizeLinear may read them"
    if not found and not odd:
        yield "no DequantizeLinear reads its codes: add one, or remove it"


@_rule(QUANTIZE, severity="warning")
def shared_scale(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """ONNX: Q by one scale and DQ by another multiplies. TensorRT computes just that, but nobody means it."""
    scale = graph.value(node.inputs[SCALE])
    for reader in node.outputs[0].consumers():
        other = graph.value(reader.inputs[SCALE]) if reader.op_type == DEQUANTIZE else None
        if scale is None or other is None or scale.size != other.size:
            continue
        if not np.array_equal(scale.reshape(-1), other.reshape(-1), equal_nan=True):
            factor = float((other.reshape(-1) / scale.reshape(-1))[0])
            yield f"{name_of(reader)} dequantizes by another scale, so values return multiplied by {factor:.4g}"


@_rule()
def direct_weight(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """RTX: an INT8 constant is read by DequantizeLinear and by nothing else.

    TensorRT 8.6 also refuses what stands between Q and DQ of a weight, and a Clip before Q, which RTX takes. Data
    movement of a float weight all of them compute beforehand.
    """
    if (
        node.op_type in Q_DQ
        or node.op_type == "Constant"
        or not all(value in graph.constants for value in node.outputs)
    ):
        return
    readers = [reader for value in node.outputs for reader, at in value.uses() if reader.op_type in Q_DQ and at == DATA]
    for reader in readers:
        if reader.op_type == DEQUANTIZE or (quantizes_weight(reader) and node.op_type not in MOVING):
            where = "between a weight's codes and" if reader.op_type == DEQUANTIZE else "in front of"
            yield f"it stands {where} {name_of(reader)}, which TensorRT refuses: compute it now, and store the result"


@_rule()
def forbidden_op(graph: QdqModel, node: ir.Node) -> Iterator[str]:
    """GUIDE, RTX: TensorRT has no operators on integers; its own TRT_ ones are for FP8 and INT4."""
    if is_integer_operator(node):
        yield f"TensorRT has no {node.op_type}: put QuantizeLinear and DequantizeLinear around the float operator"
    elif node.op_type.startswith("TRT_") and "uantize" in node.op_type:
        yield f"{node.op_type} is not INT8: quantize by QuantizeLinear and DequantizeLinear"
