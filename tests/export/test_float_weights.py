"""INT8 weights as float ones: the same codes, so the same answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from qdq_models import Graph, classifier, matrix_product, merged_shortcut, residual, siblings

from export.float_weights import make_weights_float, with_float_weights
from export.session import run, session


def product_by_columns(path: Path) -> Path:
    """A matrix product whose scales lie along the last axis, counted from the end."""
    model = onnx.load(matrix_product(path, axis=1))
    for node in model.graph.node:
        for attribute in node.attribute:
            attribute.i = -1 if node.name.startswith("/w") else attribute.i
    onnx.save(model, path)
    return path


def without_zero_points(path: Path) -> Path:
    """One scale for all weights and no zero point."""
    graph = Graph()
    codes = graph.constant("w", np.random.default_rng(0).integers(-127, 128, (8, 8, 1, 1)).astype(np.int8))
    weights = graph.node("DequantizeLinear", [codes, graph.constant("w_scale", np.float32(0.01))], "w_dq")
    graph.node("Conv", [graph.quantized("input", "x"), weights], "conv", kernel_shape=[1, 1])
    return graph.save(path, ("N", 8, 4, 4), ("N", 8, 4, 4))


@pytest.mark.parametrize(
    "model", [siblings, merged_shortcut, residual, classifier, product_by_columns, without_zero_points]
)
def test_float_weights_answer_as_int8_weights_do(tmp_path, model):
    path = model(tmp_path / "m.onnx")
    content = with_float_weights(path)
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)
    assert not [t.name for t in proto.graph.initializer if t.data_type == TensorProto.INT8 and np.prod(t.dims) > 128]
    int8 = session(path)
    shape = [4, *int8.get_inputs()[0].shape[1:]]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    (expected,), (found,) = run(int8, x).values(), run(session(content), x).values()
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(found, expected)


def test_nodes_keep_their_names(tmp_path):
    path = residual(tmp_path / "m.onnx")
    names = [node.name for node in onnx.load_from_string(with_float_weights(path)).graph.node]
    before = [node.name for node in onnx.load(path).graph.node]
    assert [name for name in names if name in before] == before
    assert len(names) == len(before) + 4  # a QuantizeLinear for each of the four layers


def test_a_weight_that_two_layers_share_stays_one(tmp_path):
    path = tmp_path / "m.onnx"
    graph = Graph()
    shared = [graph.weights("w", (8, 8, 1, 1))]
    x = graph.node("Conv", [graph.quantized("input", "x"), *shared], "a", kernel_shape=[1, 1])
    graph.nodes.append(onnx.helper.make_node("DequantizeLinear", graph.nodes[0].input, ["again"], "again", axis=0))
    graph.node("Conv", [graph.quantized(x, "y"), "again"], "b", kernel_shape=[1, 1])
    graph.save(path, ("N", 8, 4, 4), ("N", 8, 4, 4))
    names = [tensor.name for tensor in onnx.load_from_string(with_float_weights(path)).graph.initializer]
    assert [name for name in names if name.startswith("w")] == ["w_scale", "w_zero", "w_q.float"]


def two_convolutions(path: Path, name: str = "") -> onnx.ModelProto:
    """Two convolutions of INT8 weights, whose DequantizeLinear nodes are both called ``name``."""
    graph = Graph()
    x = graph.node("Conv", [graph.quantized("input", "x"), graph.weights("a", (8, 8, 1, 1))], "y", kernel_shape=[1, 1])
    graph.node("Conv", [graph.quantized(x, "z"), graph.weights("b", (8, 8, 1, 1))], "w", kernel_shape=[1, 1])
    model = onnx.load(graph.save(path, ("N", 8, 4, 4), ("N", 8, 4, 4)))
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            node.name = name
    return model


def same_answers(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with float weights, which answers as it did."""
    x = np.random.default_rng(1).standard_normal((2, 8, 4, 4)).astype(np.float32)
    expected = run(session(model.SerializeToString()), x)
    make_weights_float(model)
    onnx.checker.check_model(model, full_check=True)
    for name, found in run(session(model.SerializeToString()), x).items():
        np.testing.assert_array_equal(found, expected[name])
    return model


def int8_constants(model: onnx.ModelProto) -> list[str]:
    return [t.name for t in model.graph.initializer if t.data_type == TensorProto.INT8 and np.prod(t.dims) > 8]


def test_nodes_without_names(tmp_path):
    assert int8_constants(same_answers(two_convolutions(tmp_path / "m.onnx"))) == []


def test_names_that_are_taken(tmp_path):
    model = two_convolutions(tmp_path / "m.onnx")
    taken = helper.make_node("Identity", ["input"], ["a_q.float"], "a_q/quantize")
    model.graph.node.insert(0, taken)
    assert int8_constants(same_answers(model)) == []


def test_what_a_branch_or_an_output_reads_stays(tmp_path):
    model = two_convolutions(tmp_path / "m.onnx")
    inside = helper.make_graph(
        [helper.make_node("Cast", ["a_q"], ["cast"], to=TensorProto.FLOAT)],
        "branch",
        [],
        [helper.make_tensor_value_info("cast", TensorProto.FLOAT, (8, 8, 1, 1))],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["branch"], "if", then_branch=inside, else_branch=inside))
    model.graph.output.append(helper.make_tensor_value_info("branch", TensorProto.FLOAT, (8, 8, 1, 1)))
    model.graph.output.append(helper.make_tensor_value_info("b_q", TensorProto.INT8, (8, 8, 1, 1)))
    assert int8_constants(same_answers(model)) == ["a_q", "b_q"]


def test_initializers_that_are_inputs_too(tmp_path):
    model = two_convolutions(tmp_path / "m.onnx")
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert int8_constants(same_answers(model)) == []
    assert not [given.name for given in model.graph.input if given.name in ("a_q", "b_q")]


def test_an_empty_name_is_no_zero_point(tmp_path):
    model = two_convolutions(tmp_path / "m.onnx")
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in ("a_q", "b_q"):
            node.input[2] = ""
    assert int8_constants(same_answers(model)) == []


def test_what_is_not_symmetric_stays(tmp_path):
    model = two_convolutions(tmp_path / "m.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "a_zero":
            tensor.CopyFrom(numpy_helper.from_array(np.full(8, 3, np.int8), tensor.name))
    assert int8_constants(same_answers(model)) == ["a_q"]


@pytest.mark.parametrize(("dtype", "low", "high"), [(np.float32, -126, 100), (np.float16, -13.9, 8)])
def test_every_code_comes_back_from_any_scale(dtype, low, high):
    codes = np.arange(-127, 128).astype(dtype)
    scales = np.append(np.exp2(np.linspace(low, high, 10_000)), np.finfo(dtype).tiny).astype(dtype)[:, None]
    np.testing.assert_array_equal(np.rint(codes * scales / scales), np.broadcast_to(codes, (len(scales), 255)))
