"""Zero channels: between which convolutions they are put, that they are zero, and that the builder takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdq_models import bottleneck, classifier, residual

from deploy.builder import parse
from deploy.buildlog import BuildLog
from deploy.graph import constant_value
from deploy.padding import CHANNELS, pad_channels
from deploy.precision import declared_layers
from deploy.settings import BuildSettings
from deploy.trt import find_toolkit


def padded(model: Path) -> tuple[Any, Any, list[str], Any]:
    toolkit, log, settings = find_toolkit("tensorrt-rtx"), BuildLog(), BuildSettings(capabilities=("8.9",))
    builder = toolkit.module.Builder(toolkit.logger(log))
    network = parse(toolkit, builder, model, log, settings)
    names, kept = pad_channels(network, toolkit)
    config = toolkit.create_config(builder, settings)
    profile = builder.create_optimization_profile()
    image = tuple(network.get_input(0).shape)[1:]
    profile.set_shape("input", (1, *image), (2, *image), (4, *image))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, log.errors()
    assert bool(kept) == bool(names)
    return network, toolkit.module, names, kept


def constants(network: Any, module: Any) -> dict[str, np.ndarray]:
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return {layer.name: constant_value(layer, module) for layer in layers if layer.type.name == "CONSTANT"}


def test_the_channels_between_are_zero_and_the_rest_is_as_before(tmp_path):
    network, module, names, _ = padded(bottleneck(tmp_path / "m.onnx"))
    assert names == ["/b/Conv"]
    found = constants(network, module)
    first = found["a_w_q"]
    assert first.shape == (CHANNELS, 32, 3, 3)
    assert first.dtype == np.int8
    assert np.abs(first[:64]).max() == 127
    assert not first[64:].any()
    np.testing.assert_array_equal(found["a_w_scale"], np.r_[np.full(64, 0.01), np.ones(64)].astype(np.float32))
    second = found["b_w_q"]
    assert second.shape == (32, CHANNELS, 1, 1)
    assert np.abs(second[:, :64]).max() == 127
    assert not second[:, 64:].any()
    assert found["b_w_scale"].shape == (32,)
    layers = {network.get_layer(i).name: network.get_layer(i) for i in range(network.num_layers)}
    convolution = layers["/a/Conv"]
    convolution.__class__ = module.IConvolutionLayer
    assert convolution.num_output_maps == CHANNELS
    assert not np.asarray(convolution.bias)[64:].any()
    assert np.asarray(convolution.bias)[:64].all()
    assert tuple(layers["/b/Conv"].get_output(0).shape)[1:] == (32, 8, 8)
    assert all(layer.int8 for layer in declared_layers(network, module))


@pytest.mark.parametrize(
    "changes",
    [
        {"middle": 128},
        {"middle": 256},
        {"kernel": 3},
        {"groups": 2},
        {"tap": True},
        {"axes": (1, 0)},
        {"axes": (0, 1)},
    ],
    ids=str,
)
def test_where_they_do_not_belong(tmp_path, changes):
    _, _, names, _ = padded(bottleneck(tmp_path / "m.onnx", **changes))
    assert names == []


def test_one_scale_for_all_channels_stays_one(tmp_path):
    network, module, names, _ = padded(bottleneck(tmp_path / "m.onnx", scales=np.float32(0.01)))
    assert names == ["/b/Conv"]
    assert constants(network, module)["a_w_scale"].size == 1


def test_networks_without_such_a_place(tmp_path):
    assert padded(classifier(tmp_path / "c.onnx"))[2] == []
    assert padded(residual(tmp_path / "r.onnx"))[2] == []  # its last convolution is 3x3
