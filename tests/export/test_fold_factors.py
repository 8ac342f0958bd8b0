"""Numbers that an INT8 layer's output is multiplied by, taken into its scales and bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import pytest
import torch
from attention_forms import Attention
from onnx import numpy_helper
from qdq_models import Graph

from export.fold_factors import fold_factors
from export.from_checkpoint import export_onnx
from export.from_float_onnx import quantize_onnx
from export.linter import lint_onnx
from export.session import run, session, sqnr_db
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import prepare

X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


def layer(
    path: Path,
    operator: str = "Mul",
    factor: object = 0.25,
    *,
    kind: str = "linear",
    read_in_float: bool = False,
    swap: bool = False,
) -> Path:
    """[N, 8] -> an INT8 layer to 6 -> a reshape and a transpose -> ``factor`` -> Q -> [3, 1, N, 2]."""
    graph = Graph()
    x = graph.quantized("input", "x")
    scales, bias = np.linspace(0.005, 0.02, 6), graph.float_weights("bias", (6,))
    weight = graph.weights("w", (6, 8), scales=scales)
    if kind == "gemm":
        y = graph.node("Gemm", [x, weight, bias], "gemm", transB=1)
    else:
        y = graph.node("MatMul", [x, graph.node("Transpose", [weight], "turned", perm=[1, 0])], "product")
        if kind == "linear":
            y = graph.node("Add", [bias, y] if swap else [y, bias], "added")
        elif kind == "residual":
            y = graph.node("Add", [y, graph.node("MatMul", ["input", graph.float_weights("v", (8, 6))], "v_x")], "sum")
    y = graph.node("Reshape", [y, graph.constant("shape", np.array([-1, 1, 3, 2]))], "cut")
    y = graph.node("Transpose", [y], "moved", perm=[2, 1, 0, 3])
    number = graph.constant("factor", np.asarray(factor, np.float32))
    y = graph.node(operator, [number, y] if swap and operator == "Mul" else [y, number], "scaled")
    z = graph.quantized(y, "z")
    graph.node("Add", [z, y] if read_in_float else [z, graph.constant("zero", np.float32(0))], "output")
    return graph.save(path, ("N", 8), (3, 1, "N", 2))


def answers(path: Path) -> np.ndarray:
    return next(iter(run(session(path), {"input": X}).values()))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("kind", ["linear", "gemm", "no bias"])
@pytest.mark.parametrize(("operator", "factor"), [("Mul", 0.25), ("Div", 4.0), ("Mul", [[0.125]])])
def test_a_power_of_two_changes_no_bit(kind: str, operator: str, factor: object, tmp_path: Path) -> None:
    path = layer(tmp_path / "m.onnx", operator, factor, kind=kind, swap=factor != 0.25)
    model = ir.load(path)
    assert fold_factors(model) == 1
    ir.save(model, tmp_path / "folded.onnx")
    assert operator not in operators(tmp_path / "folded.onnx")
    assert {"factor", "w_scale"}.isdisjoint(model.graph.initializers)  # nothing reads them any more
    np.testing.assert_array_equal(answers(tmp_path / "folded.onnx"), answers(path))
    before, after = (onnx.load(one).graph.initializer for one in (path, tmp_path / "folded.onnx"))
    codes = [{one.name: numpy_helper.to_array(one) for one in found}["w_q"] for found in (before, after)]
    np.testing.assert_array_equal(*codes)


def test_another_number_changes_no_code_by_more_than_one(tmp_path: Path) -> None:
    path = layer(tmp_path / "m.onnx", factor=32**-0.5)
    model = ir.load(path)
    assert fold_factors(model) == 1
    ir.save(model, tmp_path / "folded.onnx")
    assert np.abs(answers(tmp_path / "folded.onnx") - answers(path)).max() <= 0.05 + 1e-6  # the scale of its Q


@pytest.mark.parametrize(
    "options",
    [
        {"factor": -0.25},
        {"factor": 0.0},
        {"factor": [0.25, 0.5]},
        {"kind": "residual"},
        {"read_in_float": True},
        {"operator": "Add"},
    ],
)
def test_what_is_left_alone(options: dict, tmp_path: Path) -> None:
    path = layer(tmp_path / "m.onnx", **options)
    model = ir.load(path)
    assert fold_factors(model) == 0
    assert ir.to_proto(model).graph == ir.to_proto(ir.load(path)).graph


def test_a_scale_that_would_become_too_small(tmp_path: Path) -> None:
    model = ir.load(layer(tmp_path / "m.onnx"))
    assert fold_factors(model, smallest=0.005) == 0
    assert fold_factors(model, smallest=0.005 / 4) == 1


def test_a_weight_that_another_layer_reads_too(tmp_path: Path) -> None:
    graph = Graph()
    x, weight = graph.quantized("input", "x"), graph.weights("w", (8, 8), axis=1)
    q, k = (graph.node("MatMul", [x, weight], name) for name in "qk")
    scaled = graph.quantized(graph.node("Mul", [q, graph.constant("factor", np.float32(0.5))], "scaled"), "q_q")
    graph.node("Add", [scaled, graph.quantized(k, "k_q")], "output")
    assert fold_factors(ir.load(graph.save(tmp_path / "m.onnx", ("N", 8), ("N", 8)))) == 0


@pytest.mark.parametrize(("head", "exact"), [(16, True), (32, False)])
def test_both_ways_to_a_file(head: int, exact: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Attention("three", head=head).eval()
    x = torch.randn(8, 3, 64, 64)
    prepared = prepare(network, input_shape=(3, 64, 64))
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
    sidecar = export_onnx(prepared, tmp_path / "m.onnx", images=x)
    assert "Mul" not in operators(tmp_path / "m.onnx")
    layers = [one["sqnr_db"] for one in sidecar.figures["parity"]["layers"] if one["sqnr_db"] is not None]
    assert min(layers) > (110 if exact else 60)

    export_onnx(prepared, tmp_path / "float.onnx", precision="float32", images=x)
    assert "Mul" in operators(tmp_path / "float.onnx")  # the scaling of q
    quantize_onnx(tmp_path / "float.onnx", tmp_path / "q.onnx", inputs=x.numpy())
    assert "Mul" not in operators(tmp_path / "q.onnx")


def swish(graph: Graph, x: str, name: str) -> str:
    return graph.node("Mul", [x, graph.node("Sigmoid", [x], f"{name}_sigmoid")], name)


def int8(graph: Graph, x: str, name: str, channels: int = 8, **options: Any) -> str:
    """An INT8 1x1 convolution of 8 channels."""
    weight = graph.weights(name, (channels, 8, 1, 1), **options)
    return graph.node("Conv", [x, weight, graph.float_weights(f"{name}_b", (channels,))], f"{name}_y")


def activation(path: Path, factor: float, also: str = "") -> Path:
    """A layer, a swish, ``factor`` and a Q; behind it are a layer and an average pool with another one; their sum."""
    graph = Graph()
    x = swish(graph, int8(graph, graph.quantized("input", "x"), "first"), "swish")
    x = graph.quantized(graph.node("Mul", [x, graph.constant("factor", np.float32(factor))], "scaled"), "z", 0.04)
    pooled = graph.node("AveragePool", [x], "pool", kernel_shape=[2, 2], strides=[1, 1], pads=[0, 0, 1, 1])
    one, two = int8(graph, x, "one"), int8(graph, graph.quantized(pooled, "p", 0.023), "two")
    y = graph.node("Add", [one, two], "sum")
    if also == "sum":
        y = graph.node("Add", [y, x], "more")
    elif also == "weight":
        y = graph.node("Add", [y, graph.node("Conv", [graph.quantized("input", "i"), "one_dq"], "again")], "more")
    graph.node("Relu", [y], "output")
    return graph.save(path, ("N", 8, 4, 4), ("N", 8, 4, 4))


def image_answers(path: Path) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((3, 8, 4, 4)).astype(np.float32)
    return next(iter(run(session(path), {"input": x}).values()))


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


def test_what_is_behind_a_q_takes_the_factor_of_an_activation(tmp_path: Path) -> None:
    path = activation(tmp_path / "m.onnx", 0.5)
    model = ir.load(path)
    assert fold_factors(model) == 1
    ir.save(model, tmp_path / "f.onnx")
    np.testing.assert_array_equal(image_answers(tmp_path / "f.onnx"), image_answers(path))
    before, after = initializers(path), initializers(tmp_path / "f.onnx")
    assert after["z_scale.scaled"] == 2 * before["z_scale"]  # one for the Q and its DQ
    assert after["p_scale.scaled"] == 2 * before["p_scale"]
    np.testing.assert_array_equal(after["two_scale.scaled"], before["two_scale"] / 2)
    assert all(np.array_equal(before[name], after[name]) for name in ("one_q", "two_q", "one_b", "two_b", "first_q"))
    assert lint_onnx(tmp_path / "f.onnx") == lint_onnx(path)


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_it_changes_answers_by_roundings_alone(factor: float, tmp_path: Path) -> None:
    path = activation(tmp_path / "m.onnx", factor)
    model = ir.load(path)
    assert fold_factors(model) == 1
    ir.save(model, tmp_path / "f.onnx")
    assert (sqnr_db(image_answers(path), image_answers(tmp_path / "f.onnx")) or np.inf) > 60


@pytest.mark.parametrize("also", ["sum", "weight"])
def test_an_activation_that_something_else_reads_keeps_its_factor(also: str, tmp_path: Path) -> None:
    path = activation(tmp_path / "m.onnx", 0.5, also)
    assert fold_factors(ir.load(path)) == 0


def gated(path: Path, factor: float, *, pixels: object = 4, swish_first: bool = False) -> Path:
    """A layer's result times a gate of its mean, times ``factor``, quantized and added to the input."""
    graph = Graph()
    skip = graph.quantized("input", "x")
    x = int8(graph, skip, "first")
    x = graph.quantized(swish(graph, x, "swish") if swish_first else x, "y", 0.04)
    mean = graph.quantized(graph.node("GlobalAveragePool", [x], "mean"), "mean_q")
    gate = graph.node("Sigmoid", [int8(graph, mean, "excite")], "gate")
    product = graph.node("Mul", [x, graph.quantized(gate, "g", 1 / 127)], "product")
    scaled = graph.node("Mul", [graph.constant("factor", np.float32(factor)), product], "scaled")
    graph.node("Add", [graph.quantized(scaled, "z"), skip], "output")
    return graph.save(path, ("N", 8, pixels, pixels), ("N", 8, pixels, pixels))


def fold_shaped(path: Path, output: Path) -> int:
    model = passes.ShapeInferencePass()(ir.load(path)).model
    count = fold_factors(model)
    ir.save(model, output)
    return count


def test_the_layer_before_a_gate_takes_the_factor_and_the_gate_does_not_see_it(tmp_path: Path) -> None:
    path = gated(tmp_path / "m.onnx", 0.25)
    assert fold_shaped(path, tmp_path / "f.onnx") == 1
    np.testing.assert_array_equal(image_answers(tmp_path / "f.onnx"), image_answers(path))
    before, after = initializers(path), initializers(tmp_path / "f.onnx")
    for name in ("first_scale", "first_b", "y_scale", "mean_q_scale"):
        np.testing.assert_array_equal(after[f"{name}.scaled"], before[name] / 4)
    np.testing.assert_array_equal(after["excite_scale.scaled"], before["excite_scale"] * 4)
    assert operators(tmp_path / "f.onnx").count("Mul") == 1


def test_the_gate_is_multiplied_where_no_layer_can_take_the_factor(tmp_path: Path) -> None:
    path = gated(tmp_path / "m.onnx", 0.25, swish_first=True)
    assert fold_shaped(path, tmp_path / "f.onnx") == 1
    np.testing.assert_array_equal(image_answers(tmp_path / "f.onnx"), image_answers(path))
    model = onnx.load(tmp_path / "f.onnx")
    (number,) = (node for node in model.graph.node if {"gate"} & set(node.input))
    assert (number.op_type, initializers(tmp_path / "f.onnx")["g_scale.scaled"]) == ("Mul", np.float32(1 / 127) / 4)


def test_a_gate_that_may_be_as_large_as_what_it_gates_is_left_alone(tmp_path: Path) -> None:
    assert fold_shaped(gated(tmp_path / "m.onnx", 0.25, pixels=1, swish_first=True), tmp_path / "f.onnx") == 0
    assert fold_shaped(gated(tmp_path / "m.onnx", -0.25), tmp_path / "f.onnx") == 0


@pytest.mark.parametrize("behind", [True, False])
def test_the_half_of_a_gelu_is_no_factor(behind: bool, tmp_path: Path) -> None:
    graph = Graph()
    x = int8(graph, graph.quantized("input", "x"), "first")
    bent = graph.node("Erf", [graph.node("Div", [x, graph.constant("root", np.float32(2**0.5))], "shrunk")], "bent")
    bent = graph.node("Add", [bent, graph.constant("one", np.float32(1))], "plus")
    x = graph.node("Mul", [graph.node("Mul", [x, bent], "twice"), graph.constant("half", np.float32(0.5))], "gelu")
    if behind:
        x = graph.node("Mul", [x, graph.constant("factor", np.float32(2.0))], "scaled")
    graph.node("Relu", [int8(graph, graph.quantized(x, "z"), "last")], "output")
    path = graph.save(tmp_path / "m.onnx", ("N", 8, 4, 4), ("N", 8, 4, 4))
    assert fold_shaped(path, tmp_path / "f.onnx") == behind
    assert {"half", "root"} <= initializers(tmp_path / "f.onnx").keys()
    np.testing.assert_array_equal(image_answers(tmp_path / "f.onnx"), image_answers(path))
