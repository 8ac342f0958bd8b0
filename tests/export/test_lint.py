"""Each hard rule, with a fault planted in a tiny network: found, by name, at the right node."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.lint import lint


def tiny(opset: int = 20) -> onnx.ModelProto:
    """x -> Q -> DQ -> Conv(INT8 weight behind DQ) -> y"""
    initializers = {
        "x_scale": np.float32(0.1),
        "x_zero": np.int8(0),
        "w": np.ones((4, 3, 1, 1), np.int8),
        "w_scale": np.full(4, 0.01, np.float32),
        "w_zero": np.zeros(4, np.int8),
        "b": np.zeros(4, np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"], "x/quantize"),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"], "x/dequantize"),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], "w/dequantize", axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"], ["y"], "conv"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 4, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def replace(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def found(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(finding.node, finding.rule) for finding in lint(ir.from_proto(model))]


def test_a_clean_network_has_no_findings():
    assert found(tiny()) == []


@pytest.mark.parametrize("bad", [0.0, -0.1, np.nan, np.inf])
def test_scales_are_positive_and_finite(bad):
    model = tiny()
    replace(model, "w_scale", np.array([0.01, bad, 0.01, 0.01], np.float32))
    assert found(model) == [("w/dequantize", "positive_scale")]
    assert "channel 1" in str(lint(ir.from_proto(model))[0])


def test_uint8_zero_points():
    model = tiny()
    replace(model, "x_zero", np.uint8(0))
    assert found(model) == [("x/quantize", "int8_zero_point"), ("x/dequantize", "int8_zero_point")]


def test_asymmetric_activations():
    model = tiny()
    replace(model, "x_zero", np.int8(3))
    assert found(model) == [("x/quantize", "symmetric"), ("x/dequantize", "symmetric")]


def test_a_missing_zero_point():
    model = tiny()
    del node(model, "w/dequantize").input[2]
    assert found(model) == [("w/dequantize", "explicit_zero_point")]


def test_a_zero_point_behind_an_identity():
    model = tiny()
    model.graph.node.insert(0, helper.make_node("Identity", ["w_zero"], ["w_zero_copy"], "copy"))
    node(model, "w/dequantize").input[2] = "w_zero_copy"
    assert found(model) == [("w/dequantize", "constant_zero_point")]


def test_several_scales_for_an_activation():
    model = tiny()
    replace(model, "x_scale", np.full(3, 0.1, np.float32))
    replace(model, "x_zero", np.zeros(3, np.int8))
    assert found(model) == [
        ("x/quantize", "per_tensor_activation"),
        ("x/dequantize", "per_tensor_activation"),
    ]


def test_the_wrong_channel_axis():
    model = tiny()
    node(model, "w/dequantize").attribute[0].i = 1
    assert found(model) == [("w/dequantize", "channel_axis")]


def test_a_quantized_bias():
    model = tiny()
    replace(model, "b", np.zeros(4, np.int32))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.001), "b_scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.int8(0), "b_zero"))
    bias = helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bd"], "b/dequantize")
    model.graph.node.insert(3, bias)
    node(model, "conv").input[2] = "bd"
    assert found(model) == [("conv", "float_bias")]


def test_q_and_dq_with_different_scales():
    model = tiny()
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "other"))
    node(model, "x/dequantize").input[1] = "other"
    assert found(model) == [("x/quantize", "shared_scale")]


def test_codes_read_by_something_else():
    model = tiny()
    model.graph.node.append(helper.make_node("Identity", ["xq"], ["z"], "thief"))
    assert found(model) == [("x/quantize", "pair")]


def test_quantized_operators():
    model = tiny()
    model.graph.node.append(helper.make_node("ConvInteger", ["xq", "w"], ["z"], "integer"))
    assert ("integer", "forbidden_op") in found(model)


def test_an_old_opset():
    assert found(tiny(opset=11)) == [("model", "opset")]
