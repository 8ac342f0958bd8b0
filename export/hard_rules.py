"""TensorRT's hard rules for Q/DQ networks, checked on an ONNX model: a broken one is refused, or computed otherwise.

Every rule is one function, named as in its findings, which yields what is wrong with one node in plain words. Sources:
- GUIDE: NVIDIA TensorRT Developer Guide, "Working with Quantized Types" and "Explicit Quantization";
- PARSER: NVIDIA's ONNX parser (onnx-tensorrt, QuantDequantLinearHelper), as of TensorRT 9 and of 10.11;
- RTX: what TensorRT-RTX 1.7 does with the fault (tests/export/test_lint.py builds it);
- ONNX: the operators' own definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from export.findings import Finding, Severity
from export.onnx_network import DEQUANTIZE, MOVING, QUANTIZE, WEIGHT, WEIGHTED, constant, constants, permutation
from qat.operations import COMMUTING, kind_of_onnx

PER_CHANNEL_OPSET, HALF_SCALE_OPSET = 13, 19
SMALLEST_HALF = float(np.finfo(np.float16).tiny)
"""Float16 below it, 6.1e-5, has fewer bits, and kernels may take it for zero."""
Q_DQ = (QUANTIZE, DEQUANTIZE)
DATA, SCALE, ZERO_POINT = 0, 1, 2
"""The inputs of Q and DQ nodes."""
BIAS = 2
_HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOAT_TYPES = (ir.DataType.FLOAT, *_HALF_TYPES)
_INTEGER_OPERATORS = (
    *("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"),
    *("DynamicQuantizeLinear", "QGemm", "QAttention", "QEmbedLayerNormalization"),
)


@dataclass(frozen=True)
class Graph:
    """What the rules ask about a whole model."""

    opset: int
    constants: set[ir.Value]

    def value(self, value: ir.Value | None) -> np.ndarray | None:
        """What is computed from constants alone, by whatever operators; None of anything else."""
        if value is None or value not in self.constants:
            return None
        known, node = constant(value), value.producer()
        if known is not None or node is None:
            return known
        given = {source.name or "": self.value(source) for source in node.inputs if source is not None}
        try:
            evaluated: Any = ReferenceEvaluator(ir.to_proto(node)).run(None, given)
        except Exception:  # an operator that the reference evaluator lacks: nothing is known of the value
            return None
        return np.asarray(evaluated[node.outputs.index(value)])

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The type of a tensor; what DequantizeLinear makes is of the type of its scale."""
        if value is None:
            return None
        node = value.producer()
        if node is not None and node.op_type == DEQUANTIZE and "output_dtype" not in node.attributes:
            return self.dtype(node.inputs[SCALE])
        if value.dtype is not None:
            return value.dtype
        array = self.value(value)
        return None if array is None else ir.DataType.from_numpy(array.dtype)


Check = Callable[[Graph, ir.Node], Iterator[str]]
_CHECKS: list[tuple[tuple[str, ...], Severity, Check]] = []


def _rule(*operators: str, severity: Severity = "error") -> Callable[[Check], Check]:
    """Has the decorated rule asked about every node of these operators; of all operators if none is named."""

    def record(check: Check) -> Check:
        _CHECKS.append((operators, severity, check))
        return check

    return record


def hard_findings(model: ir.Model) -> list[Finding]:
    """All broken rules in ``model``, in the order of its nodes; [] when TensorRT's rules hold."""
    graph = Graph(model.opset_imports.get("", 0), constants(model.graph))
    return list(_opset(graph, model)) + [
        Finding(_name(node), check.__name__, message, severity)
        for node in model.graph.all_nodes()
        for operators, severity, check in _CHECKS
        if not operators or node.op_type in operators
        for message in check(graph, node)
    ]


def _opset(graph: Graph, model: ir.Model) -> Iterator[Finding]:
    """ONNX: an axis exists from 13 on, 16-bit scales from 19 on. RTX takes both in older operator sets, too."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type in Q_DQ]
    per_channel = [node for node in nodes if _size(graph.value(node.inputs[SCALE])) > 1]
    half = [node for node in nodes if graph.dtype(node.inputs[SCALE]) in _HALF_TYPES]
    for what, found, needed in (
        ("several scales", per_channel, PER_CHANNEL_OPSET),
        ("16-bit scales", half, HALF_SCALE_OPSET),
    ):
        if found and graph.opset < needed:
            more = f", here and at {len(found) - 1} more nodes" if len(found) > 1 else ""
            message = f"{what}{more}: operator set {graph.opset} has none, export with {needed} or later"
            yield Finding(_name(found[0]), "opset", message)


# --- scales -----------------------------------------------------------------------------------------------------------


@_rule(*Q_DQ)
def constant_scale(graph: Graph, node: ir.Node) -> Iterator[str]:
    """GUIDE: a scale must be a build-time constant. RTX crashes on one that depends on the input."""
    scale = node.inputs[SCALE]
    if scale not in graph.constants and not _made_by_integer_operator(scale) and not _as_its_quantizer(node, SCALE):
        yield "the scale depends on the network's input: calibrate, and store it as an initializer"


@_rule(*Q_DQ)
def positive_scale(graph: Graph, node: ir.Node) -> Iterator[str]:
    """PARSER: "Scale coefficients must all be positive". RTX takes infinity, whose codes are all zero."""
    scale = graph.value(node.inputs[SCALE])
    if scale is None or _as_its_quantizer(node, SCALE):
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
def scale_count(graph: Graph, node: ir.Node) -> Iterator[str]:
    """PARSER: as many scales as indices of the axis, in one dimension."""
    scale, data = graph.value(node.inputs[SCALE]), node.inputs[DATA]
    if scale is None or scale.size == 1 or _as_its_quantizer(node, SCALE):
        return
    if scale.ndim != 1:
        yield f"scales of shape {list(scale.shape)}, in blocks: INT8 has one for a tensor or one for a channel"
    elif data is not None and data.shape is not None:
        axis, rank = _axis(node, data), data.shape.rank()
        if not 0 <= axis < rank:
            yield f"scales along axis {axis} of a tensor of {rank} dimensions: correct the axis"
        elif isinstance(extent := data.shape[axis], int) and extent != scale.size:
            yield f"{scale.size} scales for {extent} channels along axis {axis}: one is needed for each"


@_rule(*Q_DQ)
def scalar_scale(graph: Graph, node: ir.Node) -> Iterator[str]:
    """RTX takes a vector of one scale for scales along an axis, and what reads the activation computes in float.

    Of weights it takes one; PARSER takes both.
    """
    scale = graph.value(node.inputs[SCALE])
    if scale is None or scale.size != 1 or scale.ndim == 0 or _as_its_quantizer(node, SCALE):
        return
    if node.inputs[DATA] not in graph.constants:
        shape = list(scale.shape)
        yield f"the scale has shape {shape}, so TensorRT-RTX computes what reads it in float: make it a scalar"


@_rule(*Q_DQ)
def scale_type(graph: Graph, node: ir.Node) -> Iterator[str]:
    """GUIDE: a 16-bit scale must have its tensor's type. RTX refuses a layer whose inputs then differ in type."""
    scale = graph.dtype(node.inputs[SCALE])
    if scale not in _HALF_TYPES or _as_its_quantizer(node, SCALE):
        return
    if node.op_type == QUANTIZE:
        beside = [(graph.dtype(node.inputs[DATA]), "the tensor")]
    else:
        readers = [reader for reader in node.outputs[0].consumers() if reader.op_type in WEIGHTED]
        beside = [(graph.dtype(value), f"an input of {_name(reader)}") for reader in readers for value in reader.inputs]
    for dtype, what in dict.fromkeys(beside):
        if dtype in _FLOAT_TYPES and dtype != scale:
            yield f"its scale is {scale}, {what} is {dtype}: store the scale in {dtype}"


@_rule(*Q_DQ)
def half_scale_range(graph: Graph, node: ir.Node) -> Iterator[str]:
    """ONNX: float16 has no more than 10 bits, fewer below 6.1e-5. RTX takes such scales."""
    if graph.dtype(node.inputs[SCALE]) != ir.DataType.FLOAT16 or _as_its_quantizer(node, SCALE):
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
def explicit_zero_point(graph: Graph, node: ir.Node) -> Iterator[str]:
    """ONNX: without a zero point and an output_dtype codes are UINT8. PARSER, RTX: they are INT8 all the same."""
    if _input(node, ZERO_POINT) is None and not node.attributes.get_int("output_dtype", 0):
        yield "no zero point, which means UINT8 in ONNX and INT8 in TensorRT: add INT8 zeros as an initializer"


@_rule(*Q_DQ)
def constant_zero_point(graph: Graph, node: ir.Node) -> Iterator[str]:
    """PARSER of 9: only an initializer or a Constant becomes the float zero point that TensorRT wants.

    That of 10.11, and RTX, look through Identity and Cast, and through nothing else.
    """
    given = _input(node, ZERO_POINT)
    if given is None or constant(given) is not None or _as_its_quantizer(node, ZERO_POINT):
        return
    if _made_by_integer_operator(given):
        return  # see forbidden_op
    maker = given.producer()
    through = f"{maker.op_type} {_name(maker)}" if maker is not None else "the network's input"
    yield f"its zero point comes through {through}, which TensorRT 9 and older refuse: make it an initializer"


@_rule(*Q_DQ)
def symmetric(graph: Graph, node: ir.Node) -> Iterator[str]:
    """PARSER: "TensorRT only supports symmetric quantization"."""
    zero_point = graph.value(_input(node, ZERO_POINT))
    if zero_point is None or not zero_point.any() or _as_its_quantizer(node, ZERO_POINT):
        return
    if _code_type(graph, node) in (ir.DataType.INT8, None):
        worst = zero_point.reshape(-1)[np.argmax(zero_point != 0)]
        yield f"its zero point is {worst}, and TensorRT's INT8 is symmetric: quantize again with zero point 0"


@_rule(*Q_DQ)
def zero_point_shape(graph: Graph, node: ir.Node) -> Iterator[str]:
    """PARSER: "The scale and zero point must have the same volume"."""
    scale, zero_point = graph.value(node.inputs[SCALE]), graph.value(_input(node, ZERO_POINT))
    if scale is None or zero_point is None or scale.size == zero_point.size:
        return
    if not (_as_its_quantizer(node, SCALE) and _as_its_quantizer(node, ZERO_POINT)):
        yield f"{scale.size} scales, but {zero_point.size} zero points: one is needed for each scale"


@_rule(*Q_DQ)
def int8_codes(graph: Graph, node: ir.Node) -> Iterator[str]:
    """PARSER, RTX: UINT8 codes are refused, or read as INT8 with a warning; 16 bits are refused."""
    codes = _code_type(graph, node)
    if codes in (ir.DataType.INT8, None) or (node.op_type == DEQUANTIZE and codes == ir.DataType.INT32):
        return  # INT32: see float_bias
    zero_point = graph.value(_input(node, ZERO_POINT))
    if codes == ir.DataType.UINT8:
        shifted = f" with zero point {zero_point.reshape(-1)[0]}" if zero_point is not None and zero_point.any() else ""
        yield (
            f"its codes are UINT8{shifted}, which TensorRT refuses, or takes for INT8, so that those above 127 "
            "saturate: quantize again to INT8 with zero point 0"
        )
    else:
        yield f"its codes are {codes}, which is not INT8: quantize to INT8, or leave it in float"


@_rule(DEQUANTIZE)
def float_bias(graph: Graph, node: ir.Node) -> Iterator[str]:
    """GUIDE: a bias is not quantized. RTX refuses one in INT32; one in INT8, which it takes, keeps 8 bits of it."""
    readers = [
        reader
        for reader, position in node.outputs[0].uses()
        if position == BIAS and reader.op_type in WEIGHTED and node.inputs[DATA] in graph.constants
    ]
    codes = _code_type(graph, node)
    if readers or codes == ir.DataType.INT32:
        what = f"the bias of {', '.join(map(_name, readers))}" if readers else "a constant"
        yield f"it dequantizes {what} from {codes or 'codes'}: TensorRT adds biases in float, so store it in float32"


# --- granularity ------------------------------------------------------------------------------------------------------


@_rule(*Q_DQ)
def per_tensor_activation(graph: Graph, node: ir.Node) -> Iterator[str]:
    """GUIDE: activations have one scale. RTX computes what reads the tensor in float."""
    scale = graph.value(node.inputs[SCALE])
    if _size(scale) > 1 and node.inputs[DATA] not in graph.constants and not _as_its_quantizer(node, SCALE):
        yield f"an activation has {_size(scale)} scales, so what reads it computes in float: use one for the tensor"


@_rule(DEQUANTIZE)
def channel_axis(graph: Graph, node: ir.Node) -> Iterator[str]:
    """GUIDE: scales of weights lie along the output channels. RTX computes in float where they do not.

    Of ConvTranspose, 10.2 and later want axis 1, 8.4 to 10.0 axis 0; RTX computes both in float.
    """
    data = node.inputs[DATA]
    if data is None or data not in graph.constants or _size(graph.value(node.inputs[SCALE])) < 2:
        return
    axis = _axis(node, data)
    if data.shape is not None and not 0 <= axis < data.shape.rank():
        return  # see scale_count
    quantize = data.producer()
    if quantize is not None and quantize.op_type == QUANTIZE and _axis(quantize, data) != axis:
        yield f"{_name(quantize)} quantizes along axis {_axis(quantize, data)}, it dequantizes along axis {axis}"
    for reader, along in _weight_readers(node.outputs[0], axis):
        wanted, turned = _output_axis(reader), "" if along == axis else f", which is axis {along} of what is read"
        if reader.op_type == "ConvTranspose" and reader.attributes.get_int("group", 1) > 1:
            yield f"no axis of a grouped transposed convolution ({_name(reader)}) is its output channels: use one scale"
        elif along != wanted:
            older = " (of TensorRT 8.4 to 10.0 axis 0)" if reader.op_type == "ConvTranspose" else ""
            yield (
                f"scales along axis {axis}{turned}, but the output channels of {_name(reader)} are axis {wanted}"
                f"{older}, so it computes in float: quantize along the output channels"
            )


@_rule(DEQUANTIZE)
def scalar_constant(graph: Graph, node: ir.Node) -> Iterator[str]:
    """RTX reshapes a constant of no dimension before DequantizeLinear, and then refuses what stands between the two."""
    data = node.inputs[DATA]
    if data is not None and (codes := constant(data)) is not None and codes.ndim == 0:
        yield "it dequantizes a scalar constant, which TensorRT-RTX refuses: store it in float32"


# --- what stands around Q and DQ --------------------------------------------------------------------------------------


@_rule(QUANTIZE)
def pair(graph: Graph, node: ir.Node) -> Iterator[str]:
    """GUIDE: every Q has its DQ. RTX passes codes through data movement, Relu and Clip; all else reads float."""
    if node.inputs[DATA] in graph.constants:
        return  # see direct_weight
    odd, found = _code_readers(node.outputs[0])
    for reader in odd:
        yield f"its codes are read by {reader.op_type} {_name(reader)}: only DequantizeLinear may read them"
    if not found and not odd:
        yield "no DequantizeLinear reads its codes: add one, or remove it"


@_rule(QUANTIZE, severity="warning")
def shared_scale(graph: Graph, node: ir.Node) -> Iterator[str]:
    """ONNX: Q by one scale and DQ by another multiplies. TensorRT computes just that, but nobody means it."""
    scale = graph.value(node.inputs[SCALE])
    for reader in node.outputs[0].consumers():
        other = graph.value(reader.inputs[SCALE]) if reader.op_type == DEQUANTIZE else None
        if scale is None or other is None or scale.size != other.size:
            continue
        if not np.array_equal(scale.reshape(-1), other.reshape(-1), equal_nan=True):
            factor = float((other.reshape(-1) / scale.reshape(-1))[0])
            yield f"{_name(reader)} dequantizes by another scale, so values return multiplied by {factor:.4g}"


@_rule()
def direct_weight(graph: Graph, node: ir.Node) -> Iterator[str]:
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
        if reader.op_type == DEQUANTIZE or (_quantizes_weight(reader) and node.op_type not in MOVING):
            where = "between a weight's codes and" if reader.op_type == DEQUANTIZE else "in front of"
            yield f"it stands {where} {_name(reader)}, which TensorRT refuses: compute it now, and store the result"


@_rule()
def forbidden_op(graph: Graph, node: ir.Node) -> Iterator[str]:
    """GUIDE, RTX: TensorRT has no operators on integers; its own TRT_ ones are for FP8 and INT4."""
    if _is_integer_operator(node):
        yield f"TensorRT has no {node.op_type}: put QuantizeLinear and DequantizeLinear around the float operator"
    elif node.op_type.startswith("TRT_") and "uantize" in node.op_type:
        yield f"{node.op_type} is not INT8: quantize by QuantizeLinear and DequantizeLinear"


# --- graph questions --------------------------------------------------------------------------------------------------


def _name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if len(node.inputs) > position else None


def _size(array: np.ndarray | None) -> int:
    return 0 if array is None else array.size


def _is_integer_operator(node: ir.Node) -> bool:
    return node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OPERATORS


def _made_by_integer_operator(value: ir.Value | None) -> bool:
    maker = value.producer() if value is not None else None
    return maker is not None and _is_integer_operator(maker)


def _axis(node: ir.Node, data: ir.Value) -> int:
    """The axis of a Q's or DQ's scales, counted from the front."""
    axis = node.attributes.get_int("axis", 1)
    return axis + data.shape.rank() if axis < 0 and data.shape is not None else axis


def _as_its_quantizer(node: ir.Node, position: int) -> bool:
    """Whether a DQ reads the scale or zero point of the Q before it, where the rules ask about it already."""
    data = node.inputs[DATA]
    maker = data.producer() if data is not None and node.op_type == DEQUANTIZE else None
    return maker is not None and maker.op_type == QUANTIZE and _input(maker, position) is _input(node, position)


def _code_type(graph: Graph, node: ir.Node) -> ir.DataType | None:
    """The type of the codes that a Q makes or a DQ reads; None where unknown, or where the Q before it tells."""
    zero_point, data = graph.dtype(_input(node, ZERO_POINT)), node.inputs[DATA]
    if node.op_type == QUANTIZE:
        stated = node.attributes.get_int("output_dtype", 0)
        return zero_point or (ir.DataType(stated) if stated else None)
    maker = data.producer() if data is not None else None
    if maker is not None and (maker.op_type == QUANTIZE or _is_integer_operator(maker)):
        return None
    return graph.dtype(data) or zero_point


def _weight_readers(value: ir.Value, axis: int) -> Iterator[tuple[ir.Node, int]]:
    """The layers that read a constant as their weight, behind Transpose too, and what ``axis`` is there."""
    for reader, position in value.uses():
        if reader.op_type in WEIGHTED and position == WEIGHT:
            yield reader, axis
        elif reader.op_type == "Transpose" and value.shape is not None:
            yield from _weight_readers(reader.outputs[0], permutation(reader, value.shape.rank()).index(axis))
        elif reader.op_type in ("Identity", "Cast"):
            yield from _weight_readers(reader.outputs[0], axis)


def _quantizes_weight(quantize: ir.Node) -> bool:
    readers = quantize.outputs[0].consumers()
    return any(any(_weight_readers(value, 0)) for reader in readers for value in reader.outputs)


def _output_axis(layer: ir.Node) -> int:
    """The axis of the output channels in a layer's weight."""
    if layer.op_type == "Conv" or (layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) == 1):
        return 0
    weight = layer.inputs[WEIGHT]
    if layer.op_type == "MatMul" and weight is not None and weight.shape is not None:
        return weight.shape.rank() - 1
    return 1


def _code_readers(codes: ir.Value) -> tuple[list[ir.Node], bool]:
    """Who computes on codes, and whether a DequantizeLinear or the caller gets them; data movement passes them on."""
    odd, found = [], codes.is_graph_output()
    for reader in codes.consumers():
        if reader.op_type == DEQUANTIZE:
            found = True
        elif kind_of_onnx(reader.op_type, {}) in COMMUTING:
            behind = [_code_readers(value) for value in reader.outputs]
            odd += [node for nodes, _ in behind for node in nodes]
            found = found or any(there for _, there in behind)
        elif _is_integer_operator(reader):
            found = True  # see forbidden_op
        else:
            odd.append(reader)
    return odd, found
