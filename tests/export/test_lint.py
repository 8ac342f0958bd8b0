"""Each hard rule, with a fault planted in a tiny network: found, by name, at the right node; and what a builder does.

The real builder of TensorRT-RTX judges every fault: it refuses the network, computes the layer in float, or takes it
all the same, where the rule's docstring names another source.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import Graph, save

from deploy.build_log import BuildLog
from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from export.findings import LintFinding
from export.hard_rules import HARD_RULES, hard_findings
from export.linter import lint_model
from export.operator_rules import _LACKING, _TAKEN_OF_MICROSOFT, onnx_operators
from export.read import read_onnx
from qat.base.errors import UserError

Part = Callable[[Graph], str]
Verdict = Literal["INT8", "float", "refused"]
CHANNELS = 16
SCALE, ZERO = np.float32(0.05), np.int8(0)
INT8, HALF = TensorProto.INT8, TensorProto.FLOAT16


# --- a quantized convolution, part by part


def activation(scale: Any = SCALE, zero: Any = ZERO, q: dict[str, Any] | None = None, tensor: str = "x") -> Part:
    """Q and DQ of the input; no zero point where it is None, and a scale or zero point that is a str is a tensor."""

    def add(graph: Graph) -> str:
        given = [_given(graph, "x/scale", scale), _given(graph, "x/zero", zero)]
        inputs = [name for name in given if name]
        codes = graph.node("QuantizeLinear", [tensor, *inputs], "x/quantize", **(q or {}))
        return graph.node("DequantizeLinear", [codes, *inputs], "x/dequantize")

    return add


def codes(scale: Any = 0.01, zero: Any = ZERO, dtype: type = np.int8, axis: int = 0) -> Part:
    """INT8 weights behind DequantizeLinear, one scale for each channel where ``scale`` is a number."""

    def add(graph: Graph) -> str:
        scales = np.full(CHANNELS, scale, np.float32) if isinstance(scale, float) else scale
        zeros = np.full(np.shape(scales), zero) if isinstance(zero, np.generic) else zero
        given = [graph.constant("w", np.ones((CHANNELS, CHANNELS, 3, 3), dtype))]
        given += [_given(graph, "w/scale", scales), _given(graph, "w/zero", zeros)]
        return graph.node("DequantizeLinear", [name for name in given if name], "w/dequantize", axis=axis)

    return add


def _given(graph: Graph, name: str, value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else graph.constant(name, value)


def between(*, before_q: Callable[[Graph, str], str] | None = None, before_dq: Callable[[Graph, str], str]) -> Part:
    """A weight: float behind ``before_q``, Q and DQ where that is given, else INT8 codes; ``before_dq`` reads codes."""

    def add(graph: Graph) -> str:
        shape = (CHANNELS, CHANNELS, 3, 3)
        given = [graph.constant("w/scale", np.full(CHANNELS, 0.01, np.float32))]
        given.append(graph.constant("w/zero", np.zeros(CHANNELS, np.int8)))
        if before_q is None:
            codes = graph.constant("w", np.ones(shape, np.int8))
        else:
            weight = before_q(graph, graph.constant("w", np.ones(shape, np.float32)))
            codes = graph.node("QuantizeLinear", [weight, *given], "w/quantize", axis=0)
        return graph.node("DequantizeLinear", [before_dq(graph, codes), *given], "w/dequantize", axis=0)

    return add


def same(graph: Graph, tensor: str) -> str:
    return tensor


def through(op: str, *others: Any, **attributes: Any) -> Callable[[Graph, str], str]:
    """A node of this operator, called odd; ``others`` are constants that it reads too."""

    def add(graph: Graph, tensor: str) -> str:
        inputs = [graph.constant(f"odd{index}", value) for index, value in enumerate(others)]
        return graph.node(op, [tensor, *inputs], "odd", **attributes)

    return add


def made_by(op: str, constant: Any, into: Callable[[str], Part], **attributes: Any) -> Part:
    """``into`` with a parameter that a node called odd makes of a constant."""

    def add(graph: Graph) -> str:
        return into(graph.node(op, [graph.constant("odd0", constant)], "odd", **attributes))(graph)

    return add


def convolution(x: Part | None = None, w: Part | None = None, b: Part | None = None, **options: Any) -> onnx.ModelProto:
    """x -> Q -> DQ -> Conv(INT8 weight behind DQ) -> Relu"""
    graph = Graph()
    inputs = [(x or activation())(graph), (w or codes())(graph)] + ([b(graph)] if b else [])
    graph.node("Conv", inputs, "conv", kernel_shape=[3, 3], pads=[1] * 4)
    graph.node("Relu", ["conv"], "relu")
    return graph.model(**options)


def bias(codes: Any, scale: Any, zero: Any = None) -> Part:
    def add(graph: Graph) -> str:
        given = [graph.constant("b", codes), graph.constant("b/scale", scale)]
        given += [] if zero is None else [graph.constant("b/zero", zero)]
        return graph.node("DequantizeLinear", given, "b/dequantize", axis=0)

    return add


def quantized_float_bias(graph: Graph) -> str:
    return graph.qdq(graph.constant("b", np.zeros(CHANNELS, np.float32)))


def other_scale(graph: Graph) -> str:
    codes = graph.node("QuantizeLinear", ["x", *_scale(graph, "a", 0.05)], "x/quantize")
    return graph.node("DequantizeLinear", [codes, *_scale(graph, "b", 0.1)], "x/dequantize")


def several_scales_at_dq(graph: Graph) -> str:
    codes = graph.node("QuantizeLinear", ["x", *_scale(graph, "a", 0.05)], "x/quantize")
    return graph.node("DequantizeLinear", [codes, *_scale(graph, "b", np.full(CHANNELS, 0.05))], "x/dequantize")


def codes_through(op: str, *others: Any, **attributes: Any) -> Part:
    def add(graph: Graph) -> str:
        given = _scale(graph, "a", 0.05)
        codes = through(op, *others, **attributes)(graph, graph.node("QuantizeLinear", ["x", *given], "x/quantize"))
        return graph.node("DequantizeLinear", [codes, *given], "x/dequantize")

    return add


def codes_multiplied(graph: Graph) -> str:
    codes = graph.node("QuantizeLinear", ["x", *_scale(graph, "a", 0.05)], "x/quantize")
    return graph.node("Mul", [graph.node("Cast", [codes], "cast", to=TensorProto.FLOAT), "a/scale"], "scaled")


def codes_from_outside(zero: Any) -> Part:
    def add(graph: Graph) -> str:
        scale, zero_point = graph.constant("x/scale", np.float32(0.05)), graph.constant("x/zero", zero)
        return graph.node("DequantizeLinear", ["x", scale, zero_point], "x/dequantize")

    return add


def _scale(graph: Graph, name: str, scale: Any) -> list[str]:
    scales = np.asarray(scale, np.float32)
    return [graph.constant(f"{name}/scale", scales), graph.constant(f"{name}/zero", np.zeros(scales.shape, np.int8))]


# --- other networks


def half(x_scale: Any, w_scale: Any, tensor: int = HALF, opset: int = 20) -> onnx.ModelProto:
    """The convolution between casts to float16 and back; both scales in the types that are given."""
    graph = Graph()
    x = activation(x_scale, tensor=graph.node("Cast", ["x"], "half", to=tensor))(graph)
    w = codes(np.full(CHANNELS, w_scale))(graph)
    graph.node("Conv", [x, w], "conv", kernel_shape=[3, 3], pads=[1] * 4)
    graph.node("Cast", ["conv"], "y", to=TensorProto.FLOAT)
    return graph.model(opset=opset)


def product(op: str, axis: int, shape: tuple[int, int], *, turned: bool = False, **attributes: Any) -> onnx.ModelProto:
    graph = Graph()
    weight = graph.codes("w", shape, axis)
    weight = graph.node("Transpose", [weight], "turned", perm=[1, 0]) if turned else weight
    graph.node(op, [graph.qdq("x"), weight], "fc", **attributes)
    return graph.model(("N", 16))


def transposed_convolution(axis: int, group: int = 1) -> onnx.ModelProto:
    graph = Graph()
    inputs = [graph.qdq("x"), graph.codes("w", (16, 16 // group, 2, 2), axis)]
    graph.node("ConvTranspose", inputs, "up", kernel_shape=[2, 2], strides=[2, 2], group=group)
    return graph.model()


def integer(op: str) -> onnx.ModelProto:
    graph = Graph()
    given = _scale(graph, "a", 0.05)
    weight = graph.constant("w", np.ones((16, 16, 1, 1), np.int8))
    if op == "DynamicQuantizeLinear":
        graph.node(op, ["x"], "odd", ["codes", "scale", "zero"])
        given = ["scale", "zero"]
    elif op == "QLinearConv":
        codes = graph.node("QuantizeLinear", ["x", *given], "x/quantize")
        graph.node(op, [codes, *given, weight, *given, *given], "odd", ["codes"])
    else:
        codes = graph.node("QuantizeLinear", ["x", *given], "x/quantize")
        graph.node("Cast", [graph.node(op, [codes, weight], "odd")], "y", to=TensorProto.FLOAT)
        return graph.model()
    graph.node("DequantizeLinear", ["codes", *given], "y")
    return graph.model()


def scalar_constant() -> onnx.ModelProto:
    graph = Graph()
    scale = _scale(graph, "k", 0.05)
    factor = graph.node("DequantizeLinear", [graph.constant("k", np.int8(3)), *scale], "k/dequantize")
    graph.conv(graph.qdq(graph.node("Mul", ["x", factor], "scaled")), "conv", 16, 16)
    return graph.model()


def computed_summand() -> onnx.ModelProto:
    graph = Graph()
    summand = graph.node("Mul", [graph.random("k", (16, 1, 1)), graph.constant("two", np.float32(2))], "twice")
    total = graph.node("Add", [graph.conv(graph.qdq("x"), "conv", 16, 16), graph.qdq(summand)], "add")
    graph.conv(graph.qdq(total), "behind", 16, 16)
    return graph.model()


def of_microsoft() -> onnx.ModelProto:
    model = convolution()
    for node in model.graph.node:
        if node.op_type.endswith("quantizeLinear") or node.op_type == "QuantizeLinear":
            node.domain = "com.microsoft"
    return model


def with_operator(op: str, domain: str, *functions: onnx.FunctionProto, **attributes: str) -> onnx.ModelProto:
    """A quantized convolution, and ``op`` of ``domain`` behind it; ``functions`` of the file."""
    graph = Graph()
    graph.node(op, [graph.conv(graph.qdq("x"), "conv", 16, 16)], "odd", domain=domain, **attributes)
    model = graph.model()
    model.functions.extend(functions)
    if domain not in ("", "com.microsoft"):
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def twice(name: str) -> onnx.FunctionProto:
    """A function that adds what it is given to itself."""
    body = [helper.make_node("Add", ["given", "given"], ["twice"])]
    return helper.make_function("my.own", name, ["given"], ["twice"], body, [helper.make_opsetid("", 20)])


def in_a_branch(op: str, domain: str) -> onnx.ModelProto:
    """As ``with_operator``, inside both branches of an If."""
    graph = Graph()
    conv = graph.conv(graph.qdq("x"), "conv", 16, 16)
    made = helper.make_tensor_value_info("odd", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node(op, [conv], ["odd"], "odd", domain=domain)], "branch", [], [made])
    condition = graph.constant("condition", np.bool_(True))
    graph.node("If", [condition], "y", then_branch=branch, else_branch=branch)
    return graph.model()


def unread_codes() -> onnx.ModelProto:
    graph = Graph()
    graph.node("QuantizeLinear", ["x", *_scale(graph, "a", 0.05)], "x/quantize")
    graph.conv(graph.qdq("x", name="again"), "conv", 16, 16)
    return graph.model()


def codes_as_output() -> onnx.ModelProto:
    graph = Graph()
    conv = graph.conv(graph.qdq("x"), "conv", 16, 16)
    graph.node("QuantizeLinear", [conv, *_scale(graph, "y", 0.05)], "y/quantize")
    return graph.model(output_dtype=INT8)


# --- what is right, as the builder agrees

CLEAN: dict[str, Callable[[], onnx.ModelProto]] = {
    "int8 weights": convolution,
    "float weights": lambda: convolution(w=between(before_q=same, before_dq=same)),
    "per-tensor weights": lambda: convolution(w=codes(np.float32(0.01))),
    "an axis from the end": lambda: convolution(w=codes(axis=-4)),
    "int8 weights without a zero point": lambda: convolution(w=codes(zero=None)),
    "a type instead of a zero point": lambda: convolution(activation(zero=None, q={"output_dtype": INT8}), opset=21),
    "a scale behind Identity": lambda: convolution(
        made_by("Identity", np.float32(0.05), lambda name: activation(name))
    ),
    "a scale that is cast": lambda: convolution(
        made_by("Cast", np.float16(0.05), lambda name: activation(name), to=TensorProto.FLOAT)
    ),
    "a weight that is transposed before Q": lambda: convolution(
        w=between(before_q=through("Transpose", perm=[1, 0, 2, 3]), before_dq=same)
    ),
    "codes through MaxPool": lambda: convolution(codes_through("MaxPool", kernel_shape=[1, 1])),
    "codes through Transpose": lambda: convolution(codes_through("Transpose", perm=[0, 1, 3, 2])),
    "codes from outside": lambda: convolution(codes_from_outside(np.int8(0)), dtype=INT8),
    "codes to the outside": codes_as_output,
    "one scale in operator set 12": lambda: convolution(w=_without_axis(codes(np.float32(0.01))), opset=12),
    "float16 throughout": lambda: half(np.float16(0.05), np.float16(0.01), opset=19),
    "Gemm": lambda: product("Gemm", 1, (16, 24)),
    "Gemm with transB": lambda: product("Gemm", 0, (24, 16), transB=1),
    "MatMul": lambda: product("MatMul", 1, (16, 24)),
    "MatMul behind Transpose": lambda: product("MatMul", 0, (24, 16), turned=True),
    "a computed constant that is no weight": computed_summand,
    "operators of com.microsoft": of_microsoft,
    "an activation of com.microsoft": lambda: with_operator("Gelu", "com.microsoft"),
    "an operator of ONNX by its full name": lambda: with_operator("Relu", "ai.onnx"),
    "a function of the file": lambda: with_operator("Twice", "my.own", twice("Twice")),
}


def _without_axis(part: Part) -> Part:
    def add(graph: Graph) -> str:
        name = part(graph)
        del graph.nodes[-1].attribute[:]
        return name

    return add


# --- what is wrong: the network, what is found in it, and what TensorRT-RTX does with it

X, W, B = "x/quantize", "w/dequantize", "b/dequantize"
FAULTS: dict[str, tuple[Callable[[], onnx.ModelProto], str, str, Verdict]] = {
    "zero scale": (lambda: convolution(activation(np.float32(0))), X, "positive_scale", "refused"),
    "zero scale behind Identity": (
        lambda: convolution(made_by("Identity", np.float32(0), lambda name: activation(name))),
        *(X, "positive_scale", "INT8"),
    ),
    "negative scale": (lambda: convolution(w=codes(_scales(-0.1))), W, "positive_scale", "refused"),
    "scale that is no number": (lambda: convolution(w=codes(_scales(np.nan))), W, "positive_scale", "refused"),
    "infinite scale": (lambda: convolution(w=codes(_scales(np.inf))), W, "positive_scale", "INT8"),
    "too few scales": (lambda: convolution(w=codes(np.full(7, 0.01, np.float32))), W, "scale_count", "refused"),
    "scales in blocks": (
        lambda: convolution(w=codes(np.full((16, 1, 1, 1), 0.01, np.float32))),
        *(W, "scale_count", "refused"),
    ),
    "an axis that is none": (lambda: convolution(w=codes(axis=7)), W, "scale_count", "refused"),
    "a vector of one scale": (
        lambda: convolution(activation(np.full(1, 0.05, np.float32), np.zeros(1, np.int8))),
        *(X, "scalar_scale", "float"),
    ),
    "float16 scale of a float32 tensor": (
        lambda: half(np.float16(0.05), np.float32(0.01), TensorProto.FLOAT),
        *(X, "scale_type", "refused"),
    ),
    "float16 scale of a weight in float32": (
        lambda: half(np.float32(0.05), np.float16(0.01), TensorProto.FLOAT),
        *(W, "scale_type", "refused"),
    ),
    "float16 scales below the normal numbers": (
        lambda: half(np.float16(0.05), np.float16(3e-5)),
        *(W, "half_scale_range", "INT8"),
    ),
    "float16 scales in operator set 17": (
        lambda: half(np.float16(0.05), np.float16(0.01), opset=17),
        *(X, "opset", "INT8"),
    ),
    "scales of channels in operator set 12": (lambda: convolution(opset=12), W, "opset", "INT8"),
    "no zero point": (lambda: convolution(activation(zero=None)), X, "explicit_zero_point", "INT8"),
    "zero point behind Identity": (
        lambda: convolution(made_by("Identity", np.int8(0), lambda name: activation(zero=name))),
        *(X, "constant_zero_point", "INT8"),
    ),
    "zero point of a weight behind Identity": (
        lambda: convolution(w=made_by("Identity", np.zeros(16, np.int8), lambda name: codes(zero=name))),
        *(W, "constant_zero_point", "INT8"),
    ),
    "zero point behind Cast": (
        lambda: convolution(made_by("Cast", np.float32(0), lambda name: activation(zero=name), to=INT8)),
        *(X, "constant_zero_point", "INT8"),
    ),
    "zero point behind ConstantOfShape": (
        lambda: convolution(
            made_by(
                "ConstantOfShape",
                np.zeros(0, np.int64),
                lambda name: activation(zero=name),
                value=numpy_helper.from_array(np.zeros(1, np.int8)),
            )
        ),
        *(X, "constant_zero_point", "refused"),
    ),
    "asymmetric activation": (lambda: convolution(activation(zero=np.int8(3))), X, "symmetric", "refused"),
    "asymmetric weight": (lambda: convolution(w=codes(zero=np.int8(3))), W, "symmetric", "refused"),
    "one zero point for many scales": (
        lambda: convolution(w=codes(zero=np.zeros((), np.int8))),
        *(W, "zero_point_shape", "refused"),
    ),
    "UINT8 activation": (lambda: convolution(activation(zero=np.uint8(0))), X, "int8_codes", "refused"),
    "UINT8 activation around 128": (lambda: convolution(activation(zero=np.uint8(128))), X, "int8_codes", "refused"),
    "UINT8 weight": (
        lambda: convolution(w=codes(zero=np.uint8(0), dtype=np.uint8)),
        *(W, "int8_codes", "refused"),
    ),
    "UINT8 from outside": (
        lambda: convolution(codes_from_outside(np.uint8(0)), dtype=TensorProto.UINT8),
        *("x/dequantize", "int8_codes", "refused"),
    ),
    "INT16": (lambda: convolution(activation(zero=np.int16(0)), opset=21), X, "int8_codes", "refused"),
    "FP8": (
        lambda: convolution(activation(zero=None, q={"output_dtype": TensorProto.FLOAT8E4M3FN}), opset=21),
        *(X, "int8_codes", "refused"),
    ),
    "INT32 bias as ONNX Runtime writes it": (
        lambda: convolution(b=bias(np.zeros(16, np.int32), np.full(16, 0.0005, np.float32), np.zeros(16, np.int32))),
        *(B, "float_bias", "refused"),
    ),
    "INT32 bias with one scale": (
        lambda: convolution(b=bias(np.zeros(16, np.int32), np.float32(0.0005))),
        *(B, "float_bias", "refused"),
    ),
    "INT8 bias": (
        lambda: convolution(b=bias(np.zeros(16, np.int8), np.float32(0.0005), np.int8(0))),
        *(B, "float_bias", "INT8"),
    ),
    "float bias behind Q and DQ": (lambda: convolution(b=quantized_float_bias), B, "float_bias", "INT8"),
    "several scales of an activation": (
        lambda: convolution(activation(np.full(16, 0.05, np.float32), np.zeros(16, np.int8))),
        *(X, "per_tensor_activation", "float"),
    ),
    "several scales at DQ": (
        lambda: convolution(several_scales_at_dq),
        *("x/dequantize", "per_tensor_activation", "float"),
    ),
    "scales along the input channels": (lambda: convolution(w=codes(axis=1)), W, "channel_axis", "float"),
    "the default axis": (lambda: convolution(w=_without_axis(codes())), W, "channel_axis", "float"),
    "Gemm, axis 0": (lambda: product("Gemm", 0, (16, 24)), W, "channel_axis", "float"),
    "Gemm with transB, axis 1": (lambda: product("Gemm", 1, (24, 16), transB=1), W, "channel_axis", "float"),
    "MatMul, axis 0": (lambda: product("MatMul", 0, (16, 24)), W, "channel_axis", "float"),
    "MatMul behind Transpose, axis 1": (
        lambda: product("MatMul", 1, (24, 16), turned=True),
        *(W, "channel_axis", "float"),
    ),
    "ConvTranspose, axis 0": (lambda: transposed_convolution(0), W, "channel_axis", "float"),
    "ConvTranspose in groups": (lambda: transposed_convolution(1, group=2), W, "channel_axis", "float"),
    "a scalar constant": (scalar_constant, "k/dequantize", "scalar_constant", "refused"),
    "codes through Clip": (
        lambda: convolution(codes_through("Clip", np.int8(-127), np.int8(127))),
        *(X, "pair", "INT8"),
    ),
    "codes that are multiplied": (lambda: convolution(codes_multiplied), X, "pair", "float"),
    "codes that nobody reads": (unread_codes, X, "pair", "INT8"),
    "Clip of a float weight": (
        lambda: convolution(w=between(before_q=through("Clip", np.float32(-1), np.float32(1)), before_dq=same)),
        *("odd", "direct_weight", "INT8"),
    ),
    "Clip between Q and DQ of a weight": (
        lambda: convolution(w=between(before_q=same, before_dq=through("Clip", np.int8(-127), np.int8(127)))),
        *("odd", "direct_weight", "INT8"),
    ),
    "Clip of an INT8 weight": (
        lambda: convolution(w=between(before_dq=through("Clip", np.int8(-127), np.int8(127)))),
        *("odd", "direct_weight", "refused"),
    ),
    "Identity of an INT8 weight": (
        lambda: convolution(w=between(before_dq=through("Identity"))),
        *("odd", "direct_weight", "refused"),
    ),
    "QLinearConv": (lambda: integer("QLinearConv"), "odd", "forbidden_op", "refused"),
    "ConvInteger": (lambda: integer("ConvInteger"), "odd", "forbidden_op", "refused"),
    "DynamicQuantizeLinear": (lambda: integer("DynamicQuantizeLinear"), "odd", "forbidden_op", "refused"),
    "ONNX Runtime's own operator": (
        lambda: with_operator("QuickGelu", "com.microsoft"),
        *("odd", "unknown_operator", "refused"),
    ),
    "an operator of nobody's": (
        lambda: with_operator("Frobnicate", "my.own"),
        *("odd", "unknown_operator", "refused"),
    ),
    "an operator of ONNX that TensorRT does not have": (
        lambda: with_operator("Det", ""),
        *("odd", "unknown_operator", "refused"),
    ),
    "an equation in capitals": (
        lambda: with_operator("Einsum", "", equation="NC H W->NHWC"),
        *("odd", "einsum_letters", "refused"),
    ),
    "an operator that ONNX does not have": (
        lambda: with_operator("FusedConv", ""),
        *("odd", "unknown_operator", "refused"),
    ),
    "a function with the name of an operator": (
        lambda: with_operator("Relu", "my.own", twice("Relu")),
        *("odd", "unknown_operator", "INT8"),  # TensorRT-RTX computes a Relu
    ),
}


def _scales(bad: float) -> np.ndarray:
    scales = np.full(CHANNELS, 0.01, np.float32)
    scales[5] = bad
    return scales


@pytest.fixture(scope="module")
def toolkit():
    return find_toolkit("tensorrt-rtx")


def judged(toolkit, path: Path) -> str:
    """What TensorRT-RTX makes of a network: INT8 products only, some in float, or nothing."""
    try:
        audit = build(toolkit, path, BuildSettings()).audit
    except UserError:
        return "refused"
    return "INT8" if audit.findings and all(found.precision == "INT8" for found in audit.findings) else "float"


def found(path: Path) -> list[LintFinding]:
    return hard_findings(read_onnx(path))


def test_every_hard_rule_has_a_name_a_sentence_a_source_and_a_fault_that_breaks_it():
    for name, rule in HARD_RULES.items():
        assert rule.name == name
        assert rule.sentence
        assert rule.source
    broken = {rule for _, _, rule, _ in FAULTS.values()}
    assert HARD_RULES.keys() - broken == {"constant_scale", "shared_scale", "plugin"}  # each has a test of its own


@pytest.mark.parametrize("name", CLEAN)
def test_what_is_right_has_no_findings_and_runs_in_int8(name, tmp_path, toolkit):
    path = save(CLEAN[name](), tmp_path / "m.onnx")
    assert found(path) == []
    assert judged(toolkit, path) == "INT8"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_alone_and_the_builder_judges_it(name, tmp_path, toolkit):
    make, node, rule, verdict = FAULTS[name]
    path = save(make(), tmp_path / "m.onnx")
    assert [(finding.node, finding.rule, finding.severity) for finding in found(path)] == [(node, rule, "error")]
    assert judged(toolkit, path) == verdict


def test_a_scale_that_depends_on_the_input(tmp_path):
    """Not built: TensorRT-RTX 1.7 crashes on it."""

    def scale(graph: Graph) -> str:
        return activation(graph.node("ReduceMax", ["x"], "amax", keepdims=0))(graph)

    path = save(convolution(scale), tmp_path / "m.onnx")
    assert [(finding.node, finding.rule) for finding in found(path)] == [(X, "constant_scale")]


def test_another_scale_at_dq_is_computed_as_it_stands(tmp_path, toolkit):
    path = save(convolution(other_scale), tmp_path / "m.onnx")
    (finding,) = found(path)
    assert (finding.node, finding.rule, finding.severity) == (X, "shared_scale", "warning")
    assert "multiplied by 2" in finding.message
    assert judged(toolkit, path) == "INT8"


def test_operators_for_other_types_than_int8(tmp_path):
    graph = Graph()
    codes = graph.node("TRT_FP8QuantizeLinear", ["x", *_scale(graph, "a", 0.05)[:1]], "odd", domain="trt")
    graph.node("TRT_FP8DequantizeLinear", [codes, "a/scale"], "y", domain="trt")
    path = save(graph.model(), tmp_path / "m.onnx")
    assert [(finding.node, finding.rule) for finding in found(path)] == [("odd", "forbidden_op"), ("y", "forbidden_op")]


@pytest.mark.parametrize(("op", "domain"), [("EfficientNMS_TRT", ""), ("Own", "trt.plugins")])
def test_a_plugin_is_warned_of(op, domain, tmp_path, toolkit):
    path = save(with_operator(op, domain), tmp_path / "m.onnx")
    (finding,) = found(path)
    assert (finding.node, finding.rule, finding.severity) == ("odd", "plugin", "warning")
    assert f"needs the plugin {op}" in finding.message
    assert judged(toolkit, path) == "refused"


def test_an_unknown_operator_in_a_branch_is_found(tmp_path, toolkit):
    path = save(in_a_branch("QuickGelu", "com.microsoft"), tmp_path / "m.onnx")
    assert [(finding.node, finding.rule) for finding in found(path)] == [("odd", "unknown_operator")] * 2
    assert judged(toolkit, path) == "refused"


def test_what_tensorrt_takes_of_com_microsoft_is_what_its_parser_has(toolkit):
    log = BuildLog()
    network = toolkit.create_network(toolkit.module.Builder(toolkit.logger(log)))
    parser = toolkit.module.OnnxParser(network, toolkit.logger(log))
    assert [op for op in _TAKEN_OF_MICROSOFT if not parser.supports_operator(op)] == []
    for op in ("FusedConv", "FusedMatMul", "BiasGelu", "FastGelu", "QuickGelu", "SkipLayerNormalization", "NhwcConv"):
        assert not parser.supports_operator(op)
    assert [op for op in _LACKING if parser.supports_operator(op)] == []
    newer = {"BitCast", "CumProd", "SwiGLU"}  # which not every version of onnx has
    assert onnx_operators() >= _LACKING - newer


def test_messages_say_where_and_what_to_do(tmp_path):
    def message(model: onnx.ModelProto) -> str:
        (finding,) = found(save(model, tmp_path / "m.onnx"))
        return str(finding)

    assert message(convolution(w=codes(_scales(0)))).startswith("w/dequantize: 1 of 16 scales are not positive and fin")
    assert "first at channel 5, which a dead channel causes: floor" in message(convolution(w=codes(_scales(0))))
    assert "the output channels of conv are axis 0, so it computes in float" in message(convolution(w=codes(axis=1)))
    turned = product("MatMul", 1, (24, 16), turned=True)
    assert "axis 1, which is axis 0 of what is read, but the output channels of fc are axis 1" in message(turned)
    assert "of TensorRT 8.4 to 10.0 axis 0" in message(transposed_convolution(0))
    assert "with one scale for all of them, which suits every version" in message(transposed_convolution(0))
    assert "has no known INT8 kernel: keep it in float" in message(transposed_convolution(1, group=2))
    assert found(save(transposed_convolution(1), tmp_path / "m.onnx")) == []
    assert "UINT8 with zero point 128" in message(convolution(activation(zero=np.uint8(128))))
    assert "comes through Identity odd" in message(FAULTS["zero point behind Identity"][0]())
    assert "the bias of conv from INT32" in message(FAULTS["INT32 bias with one scale"][0]())
    assert "several scales: operator set 12 has none, export with 13 or later" in message(convolution(opset=12))
    assert "16-bit scales, here and at 2 more nodes" in message(half(np.float16(0.05), np.float16(0.01), opset=17))
    assert message(with_operator("FusedConv", "com.microsoft")).startswith(
        "odd: com.microsoft.FusedConv is ONNX Runtime's own operator, which TensorRT refuses: give the network as it"
    )
    assert (
        "my.own.Frobnicate is not an operator of ONNX, so TensorRT refuses it unless a plugin of that name"
        in message(with_operator("Frobnicate", "my.own"))
    )
    assert "computes ONNX's Relu instead of my.own.Relu" in message(with_operator("Relu", "my.own", twice("Relu")))
    assert "between a weight's codes and w/dequantize" in message(FAULTS["Clip of an INT8 weight"][0]())


def test_two_faults_of_a_zero_point_are_two_findings(tmp_path):
    model = convolution(made_by("Identity", np.int8(3), lambda name: activation(zero=name)))
    rules = [finding.rule for finding in found(save(model, tmp_path / "m.onnx"))]
    assert rules == ["constant_zero_point", "symmetric"]


def test_nodes_in_subgraphs_and_functions_are_checked(tmp_path):
    bad = convolution(activation(zero=np.uint8(0)))
    branch = helper.make_graph(bad.graph.node[:2], "branch", [], [_tensor("x/dequantize")], bad.graph.initializer)
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["large"]),
        helper.make_node("If", ["large"], ["y"], "if", then_branch=branch, else_branch=branch),
    ]
    zero = numpy_helper.from_array(np.float32(0), "zero")
    graph = helper.make_graph(nodes, "if", [_tensor("x")], [_tensor("y")], [zero])
    path = save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "i.onnx"
    )
    assert [(finding.node, finding.rule) for finding in found(path)] == [(X, "int8_codes")] * 2

    imports = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    given = ["x", "x/scale", "x/zero"]
    function = helper.make_function("own", "FakeQuantize", given, ["x/dequantize"], bad.graph.node[:2], imports[:1])
    call = helper.make_node("FakeQuantize", given, ["y"], "call", domain="own")
    graph = helper.make_graph([call], "f", [_tensor("x")], [_tensor("y")], bad.graph.initializer)
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=[function])
    assert [finding.rule for finding in found(save(model, tmp_path / "f.onnx"))] == ["int8_codes"]


def _tensor(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", CHANNELS, 8, 8])


def test_lint_gives_errors_first_and_placement_after_them(tmp_path):
    clean = save(convolution(), tmp_path / "m.onnx")
    assert lint_model(read_onnx(clean)) == []

    graph = Graph()
    x = graph.node("Relu", [graph.conv("x", "float", 16, 16, quantized=False)], "relu")
    graph.node("Conv", [graph.qdq(x), codes(zero=np.int8(1))(graph)], "conv", kernel_shape=[3, 3])
    findings = lint_model(read_onnx(save(graph.model(), tmp_path / "f.onnx")))
    assert [(finding.rule, finding.severity) for finding in findings] == [
        ("symmetric", "error"),
        ("weighted_input", "warning"),
    ]
