"""ONNX Runtime as the reference: what its optimizers get wrong is off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.session import run, session


def clipped(scale: float) -> bytes:
    """DQ(Q(clip(x, 0, 6))), whose quantizer has ``scale``."""
    constants = {"low": np.float32(0), "high": np.float32(6), "scale": np.float32(scale), "zero": np.int8(0)}
    nodes = [
        helper.make_node("Clip", ["x", "low", "high"], ["clipped"]),
        helper.make_node("QuantizeLinear", ["clipped", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "clipped",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.mark.parametrize("scale", [1e-2, 1e-10])
def test_a_clip_in_front_of_a_quantizer_stays(scale: float) -> None:
    x = np.array([-100, -3, 5, 90], np.float32) * np.float32(scale)
    found = run(session(clipped(scale)), x)["y"]
    np.testing.assert_allclose(found, np.array([0, 0, 5, 90], np.float32) * np.float32(scale), rtol=1e-5)


def test_a_padding_stays_in_front_of_a_max_pool(tmp_path: Path) -> None:
    pads = numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads")
    graph = helper.make_graph(
        [
            helper.make_node("Pad", ["x", "pads"], ["padded"]),
            helper.make_node("MaxPool", ["padded"], ["y"], kernel_shape=[3, 3], strides=[2, 2]),
        ],
        "padded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2, 2])],
        [pads],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    found = run(session(path), np.full((1, 1, 4, 4), -1, np.float32))["y"]
    np.testing.assert_array_equal(found, [[[[0, 0], [0, -1]]]])
