"""INT8 weights as float ones: the same answers, and what a builder gets that refuses INT8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from qdq_models import Graph, classifier, matrix_product, residual, siblings

from deploy.builder import build
from deploy.float_weights import with_float_weights
from deploy.settings import BuildSettings
from deploy.trt import Toolkit, find_toolkit
from export.session import run, session
from qat.artifact import UserError

SETTINGS = BuildSettings(capabilities=("8.9",))
TRT_8_6 = "2: [graphOptimizer.cpp::chooseHigherPrecision::7079] Error Code 2: Internal Error (Assertion dt1 failed. )"


@pytest.fixture
def toolkit() -> Toolkit:
    return find_toolkit("tensorrt-rtx")


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


def refusing(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch, *, all_networks: bool) -> None:
    """The builder refuses networks with INT8 constants, as 8.6 does, or all."""
    trt = toolkit.module
    builds = trt.Builder.build_serialized_network

    def build_serialized_network(self: Any, network: Any, config: Any) -> Any:
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        constants = [layer.get_output(0) for layer in layers if layer.type == trt.LayerType.CONSTANT]
        codes = [one for one in constants if one.dtype == trt.DataType.INT8 and trt.volume(one.shape) > 64]
        if codes or all_networks:
            self.logger.log(trt.ILogger.Severity.ERROR, TRT_8_6)
            return None
        return builds(self, network, config)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", build_serialized_network)


def test_a_builder_that_refuses_int8_weights_gets_float_ones(toolkit, tmp_path, monkeypatch, capsys):
    path = siblings(tmp_path / "m.onnx")
    plain = build(toolkit, path, SETTINGS)
    assert not plain.float_weights
    refusing(toolkit, monkeypatch, all_networks=False)
    built = build(toolkit, path, SETTINGS)
    assert built.float_weights
    assert "refuses INT8 weights in this network: it gets the same codes as float weights" in capsys.readouterr().out
    assert not built.audit.broken
    assert [(one.node, one.precision) for one in built.audit.findings] == [
        (one.node, one.precision) for one in plain.audit.findings
    ]


def test_a_network_that_is_refused_with_float_weights_too(toolkit, tmp_path, monkeypatch):
    refusing(toolkit, monkeypatch, all_networks=True)
    with pytest.raises(UserError, match=r"could not build .*m\.onnx: 2: \[graphOptimizer"):
        build(toolkit, siblings(tmp_path / "m.onnx"), SETTINGS)
