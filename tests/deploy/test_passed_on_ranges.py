"""Ranges of implicit INT8 that follow from others, in networks that TensorRT-RTX parsed, and those of Q/DQ networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import qdq_models
from onnx_graphs import Graph, save
from untrained import checkpoint_of

from deploy.build_log import BuildLog
from deploy.builder import parse_onnx
from deploy.dynamic_ranges import RangeTable, _passed_on
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from export import export_onnx
from qat.base.errors import UserError

NET = """
from torch import nn

def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""


@pytest.fixture(scope="module")
def passed_on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """passed_on(model, known): what ``known`` becomes in the parsed network of an ONNX model."""
    toolkit = find_toolkit("tensorrt-rtx")
    folder, log, alive = tmp_path_factory.mktemp("models"), BuildLog(), []

    def follow(model: onnx.ModelProto, known: dict[str, float]) -> dict[str, float]:
        builder = toolkit.module.Builder(toolkit.logger(log))
        network = parse_onnx(toolkit, builder, save(model, folder / "m.onnx"), log, BuildSettings())
        alive.append((builder, network))
        return _passed_on(network, known, toolkit.module)

    yield follow
    alive.clear()


def named(found: dict[str, float]) -> dict[str, float]:
    """Without the tensors that TensorRT's parser has added, for example in a reshape."""
    return {name: amax for name, amax in found.items() if not name.startswith("(Unnamed") and "_output" not in name}


def chain(pool: str = "MaxPool") -> onnx.ModelProto:
    """x -> conv1 -> relu1 -> pool -> conv2 -> flat."""
    graph = Graph()
    x = graph.node("Relu", [graph.conv("x", "conv1", 16, 16, quantized=False)], "relu1")
    x = graph.node(pool, [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    x = graph.conv(x, "conv2", 16, 16, quantized=False)
    graph.node("Reshape", [x, graph.constant("shape", np.array([0, -1]))], "flat")
    return graph.model()


@pytest.mark.parametrize(
    ("known", "follow"),
    [
        ({"conv1": 5.0}, {}),  # a ReLU cuts: what it writes may be smaller
        ({"relu1": 6.0}, {"conv1": 6.0, "pool": 6.0}),
        ({"pool": 4.0}, {"conv1": 4.0, "relu1": 4.0}),
        ({"conv2": 3.0}, {"flat": 3.0}),
        ({"flat": 2.0}, {"conv2": 2.0}),
        ({"x": 1.0}, {}),
        ({"relu1": 6.0, "pool": 4.0, "conv1": 9.0}, {}),  # what was measured stays
        ({}, {}),
    ],
)
def test_ranges_follow_through_max_pools_reshapes_and_backwards_through_a_relu(
    passed_on: Any, known: dict[str, float], follow: dict[str, float]
) -> None:
    assert named(passed_on(chain(), known)) == known | follow


def test_ranges_do_not_follow_through_an_average_pool(passed_on: Any) -> None:
    assert named(passed_on(chain("AveragePool"), {"relu1": 6.0})) == {"relu1": 6.0, "conv1": 6.0}
    assert named(passed_on(chain("AveragePool"), {"pool": 6.0})) == {"pool": 6.0}


def test_ranges_do_not_go_back_to_a_tensor_with_two_readers(passed_on: Any) -> None:
    graph = Graph()
    conv = graph.conv("x", "conv1", 16, 16, quantized=False)
    relu = graph.node("Relu", [conv], "relu1")
    graph.node("Add", [graph.conv(relu, "conv2", 16, 16, quantized=False), conv], "sum")
    assert named(passed_on(graph.model(), {"relu1": 6.0})) == {"relu1": 6.0}


def test_ranges_do_not_go_back_to_an_output_of_the_network(passed_on: Any) -> None:
    graph = Graph()
    graph.node("Relu", [graph.conv("x", "conv1", 16, 16, quantized=False)], "relu1")
    assert named(passed_on(graph.model(outputs=["relu1"]), {"relu1": 6.0})) == {"relu1": 6.0, "conv1": 6.0}
    assert named(passed_on(graph.model(outputs=["relu1", "conv1"]), {"relu1": 6.0})) == {"relu1": 6.0}


def test_ranges_go_forward_to_every_reader(passed_on: Any) -> None:
    graph = Graph()
    conv = graph.conv("x", "conv1", 16, 16, quantized=False)
    pool = graph.node("MaxPool", [conv], "pool", kernel_shape=[2, 2], strides=[2, 2])
    turned = graph.node("Transpose", [conv], "turned", perm=[0, 2, 3, 1])
    model = graph.model(outputs=[pool, turned])
    assert named(passed_on(model, {"conv1": 7.0})) == {"conv1": 7.0, "pool": 7.0, "turned": 7.0}
    assert named(passed_on(model, {"pool": 7.0})) == {"pool": 7.0}


def test_a_table_over_another_keeps_its_own_ranges() -> None:
    first = RangeTable("a.csv", {"x": 1.0, "y": 2.0}, lopsided=1, zero=("dead", "z", "both"))
    second = RangeTable("b.cache", {"y": 9.0, "z": 3.0}, lopsided=2, zero=("x", "gone", "both"))
    both = first.over(second)
    assert both.amax == {"x": 1.0, "y": 2.0, "z": 3.0}
    assert "a.csv" in both.source
    assert "b.cache" in both.source
    assert sorted(both.zero) == ["both", "dead", "gone"]  # those for which neither has a range
    assert (first.amax, second.amax) == ({"x": 1.0, "y": 2.0}, {"y": 9.0, "z": 3.0})
    assert first.over(RangeTable.constant(4.0)).other == 4.0


# --- ranges of quantized networks


def tensors_of(path: Path) -> set[str]:
    graph = onnx.load(path).graph
    return {graph.input[0].name, *(name for node in graph.node for name in node.output)}


def amax(scale: float) -> float:
    return 127 * float(np.float32(scale))


def test_the_ranges_of_a_qdq_file_have_the_names_of_the_float_file(tmp_path: Path) -> None:
    quantized = qdq_models.residual(tmp_path / "int8.onnx")
    table = RangeTable.read(quantized)
    assert table.amax == {
        **dict.fromkeys(("input", "stem_relu", "relu1", "relu2"), amax(0.03)),
        "flat": amax(0.01),
    }
    assert set(table.amax) <= tensors_of(qdq_models.residual(tmp_path / "float.onnx", quantize=False))
    assert (table.zero, table.lopsided, table.other) == ((), 0, None)
    in_float = qdq_models.residual(tmp_path / "weights.onnx", float_weights=True)
    assert RangeTable.read(in_float).amax == table.amax  # quantizers of weights are none of activations


def test_the_ranges_of_a_checkpoint_have_the_names_of_its_float_export(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    checkpoint = checkpoint_of(tmp_path, f"{tmp_path / 'net.py'}:net")
    table = RangeTable.read(checkpoint)
    float_file = tmp_path / "float.onnx"
    export_onnx(checkpoint, float_file, precision="float32")
    assert set(table.amax) <= tensors_of(float_file)
    assert "input" in table.amax
    assert len(table.amax) >= 3
    assert list(table.amax.values()) == pytest.approx([3.0] * len(table.amax), rel=1e-6)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        RangeTable.read(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_float_file_has_no_ranges(tmp_path: Path) -> None:
    path = qdq_models.residual(tmp_path / "float.onnx", quantize=False)
    assert "quantizes no activation" in refused(path)


@pytest.mark.parametrize("scale", [np.full(16, 0.05, np.float32), np.linspace(0.1, 0.2, 16, dtype=np.float32)])
def test_an_activation_with_a_scale_for_each_channel_has_no_range(tmp_path: Path, scale: np.ndarray) -> None:
    graph = Graph()
    given = [graph.constant("scale", scale), graph.constant("zero", np.zeros(16, np.int8))]
    codes = graph.node("QuantizeLinear", ["x", *given], "q", axis=1)
    x = graph.node("DequantizeLinear", [codes, *given], "dq", axis=1)
    graph.conv(x, "conv1", 16, 16)
    assert "x is not quantized by one constant scale" in refused(save(graph.model(), tmp_path / "m.onnx"))


def twice_quantized(path: Path, *scales: float) -> Path:
    graph = Graph()
    branches = [graph.conv(graph.qdq("x", scale, f"x{i}"), f"conv{i}", 16, 16) for i, scale in enumerate(scales)]
    graph.node("Add", branches, "sum")
    return save(graph.model(), path)


def test_an_activation_that_is_quantized_by_two_scales_has_no_range(tmp_path: Path) -> None:
    assert "x is not quantized by one constant scale" in refused(twice_quantized(tmp_path / "m.onnx", 0.05, 0.02))
    assert RangeTable.read(twice_quantized(tmp_path / "n.onnx", 0.05, 0.05)).amax == {"x": amax(0.05)}


@pytest.mark.parametrize("zero_point", [np.uint8(0), np.uint8(128), np.int8(-128), np.int8(3)])
def test_an_activation_with_other_codes_or_a_zero_point_has_no_range(tmp_path: Path, zero_point: object) -> None:
    path = qdq_models.convolution(tmp_path / "m.onnx", zero_point=zero_point)
    assert "input is not quantized to INT8 with zero point 0" in refused(path)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    for name in ("none.onnx", "none.qat"):
        refused(tmp_path / name)
        (tmp_path / name).write_bytes(b"junk")
        refused(tmp_path / name)
