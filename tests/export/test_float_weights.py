"""INT8 weights as float ones: the same codes, so the same answers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

sys.path.insert(0, str(Path(__file__).parent.parent / "deploy"))  # qdq_models

from qdq_models import Graph, classifier, matrix_product, residual, siblings

from export.float_weights import with_float_weights
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


@pytest.mark.parametrize("model", [siblings, residual, classifier, product_by_columns, without_zero_points])
def test_float_weights_answer_as_int8_weights_do(tmp_path, model):
    path = model(tmp_path / "m.onnx")
    content = with_float_weights(path)
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)
    assert not [t.name for t in proto.graph.initializer if t.data_type == TensorProto.INT8 and np.prod(t.dims) > 64]
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
