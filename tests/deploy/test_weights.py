"""INT8 constants as float weights with a QuantizeLinear: built by the real builder, with the same numbers."""

from __future__ import annotations

import numpy as np
from qdq_models import residual

from deploy import weights
from deploy.builder import parse
from deploy.buildlog import BuildLog
from deploy.precision import declared_layers
from deploy.settings import BuildSettings
from deploy.trt import find_toolkit


def test_every_weight_is_replaced_by_floats_on_its_own_grid(tmp_path):
    toolkit, log, settings = find_toolkit("tensorrt-rtx"), BuildLog(), BuildSettings(capabilities=("8.9",))
    builder = toolkit.module.Builder(toolkit.logger(log))
    network = parse(toolkit, builder, residual(tmp_path / "m.onnx"), log, settings)
    kept = weights.as_float(network, toolkit)
    assert sorted(array.shape for array in kept) == [(10, 32), (32, 3, 3, 3), (32, 32, 3, 3), (32, 32, 3, 3)]
    for array in kept:
        scale = (2 / np.prod(array.shape[1:])) ** 0.5 / 73
        codes = array / np.float32(scale)
        assert np.abs(codes - np.rint(codes)).max() < 1e-4
        assert np.abs(codes).max() > 100
    # no INT8 constant is left in front of a DequantizeLinear, and all layers are still declared INT8
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(0).name: layer for layer in layers}
    read = [makers[layer.get_input(0).name].type.name for layer in layers if layer.type.name == "DEQUANTIZE"]
    assert set(read) == {"QUANTIZE"}
    assert [layer.int8 for layer in declared_layers(network, toolkit.module)] == [True] * 4

    config = toolkit.create_config(builder, settings)
    profile = builder.create_optimization_profile()
    profile.set_shape("input", (1, 3, 32, 32), (4, 3, 32, 32), (8, 3, 32, 32))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
