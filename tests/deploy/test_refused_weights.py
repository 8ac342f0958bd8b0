"""What a builder gets that refuses INT8 weights."""

from __future__ import annotations

from typing import Any

import pytest
from qdq_models import siblings

from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from deploy.trt import Toolkit
from qat.base.errors import UserError

SETTINGS = BuildSettings(capabilities=("8.9",))
TRT_8_6 = "2: [graphOptimizer.cpp::chooseHigherPrecision::7079] Error Code 2: Internal Error (Assertion dt1 failed. )"


@pytest.fixture
def toolkit() -> Toolkit:
    return find_toolkit("tensorrt-rtx")


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
