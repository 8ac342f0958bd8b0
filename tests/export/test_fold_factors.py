"""Numbers that an INT8 layer's output is multiplied by, taken into its scales and bias."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from attention_forms import Attention
from onnx import numpy_helper
from qdq_models import Graph

from export.fold_factors import fold_factors
from export.from_checkpoint import export_onnx
from export.from_float_onnx import quantize_onnx
from export.session import run, session
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
