"""INT8 networks whose other layers compute in half precision: types, what stays float32, what TensorRT makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import timm
import torch
from commands import one_thread
from onnx import TensorProto, helper
from qdq_models import Graph, residual

from deploy.builder import build
from deploy.installed import find_toolkit
from deploy.settings import BuildSettings
from export.float_types import HalfType, store_floats_as
from export.from_checkpoint import export_onnx
from export.from_float_onnx import quantize_onnx
from export.linter import lint_onnx
from export.session import session, sqnr_db
from qat.base.errors import UserError
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import prepare

SHAPE = (2, 8, 16, 16)
TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def rewritten(
    path: Path, kind: HalfType = "float16", batches: list[Mapping[str, np.ndarray]] | None = None
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The file with half floats, checked, and why nodes stay in float32."""
    model = ir.load(path)
    kept = store_floats_as(model, kind, batches or [])
    written = path.with_suffix(f".{kind}.onnx")
    ir.save(model, written)
    proto = onnx.load(written)
    onnx.checker.check_model(proto, full_check=True)  # every type fits its operator
    return proto, {one.node: one.reason for one in kept}


def types(proto: onnx.ModelProto) -> dict[str, int]:
    """The element types of all tensors by name."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {one.name: one.data_type for one in inferred.initializer} | {
        one.name: one.type.tensor_type.elem_type for one in values
    }


def x_of(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convolution(graph: Graph, x: str, name: str) -> str:
    weights = graph.weights(f"{name}_w", (8, 8, 3, 3))
    return graph.node("Conv", [graph.quantized(x, x), weights], name, kernel_shape=[3, 3], pads=[1] * 4)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_everything_between_input_and_output_is_half(kind: HalfType, tmp_path: Path) -> None:
    path = residual(tmp_path / "m.onnx")
    proto, kept = rewritten(path, kind)
    assert kept == {}
    found = types(proto)
    half = TYPES[kind]
    assert {found[one.name] for one in (*proto.graph.input, *proto.graph.output)} == {TensorProto.FLOAT}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm", "Relu", "Add", "MaxPool", "GlobalAveragePool"):
            assert {found[name] for name in (*node.input, *node.output)} == {half}, node.name
        if node.op_type == "DequantizeLinear":
            assert found[node.input[1]] == found[node.output[0]] == half
        if node.op_type == "QuantizeLinear":  # a 16-bit scale has the type of its tensor
            assert found[node.input[1]] == found[node.input[0]]
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    casts = [node for node in proto.graph.node if node.op_type == "Cast"]
    assert len(casts) == 1  # before the output
    assert all(makers.get(node.input[0]) != "DequantizeLinear" for node in casts)
    assert [one.name for one in proto.graph.output] == [one.name for one in onnx.load(path).graph.output]


def test_the_answers_stay_within_the_rounding_of_float16(tmp_path: Path) -> None:
    path = residual(tmp_path / "m.onnx")
    proto, _ = rewritten(path)
    x = x_of((8, 3, 32, 32))
    (exact,), (found,) = (one.run(None, {"input": x}) for one in (session(path), session(proto.SerializeToString())))
    assert found.dtype == np.float32
    ratio = sqnr_db(exact, found)
    assert ratio is not None
    assert ratio > 25  # some codes round the other way
    assert (exact.argmax(1) == found.argmax(1)).all()


def test_both_sides_of_a_quantizer_have_the_same_scale(tmp_path: Path) -> None:
    graph = Graph()
    convolution(graph, "input", "a")
    proto, _ = rewritten(graph.save(tmp_path / "m.onnx", SHAPE, SHAPE))
    values = {one.name: onnx.numpy_helper.to_array(one) for one in proto.graph.initializer}
    (quantize,) = (node for node in proto.graph.node if node.op_type == "QuantizeLinear")
    (dequantize,) = (node for node in proto.graph.node if node.input[0] == quantize.output[0])
    scales = [values[node.input[1]] for node in (quantize, dequantize)]
    assert [one.dtype for one in scales] == [np.float32, np.float16]  # the input stays float32
    assert scales[0] == scales[1].astype(np.float32) != np.float32(0.05)


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [("Softmax", {"axis": 1}), ("LpNormalization", {"axis": 1}), ("ReduceSumSquare", {"keepdims": 1}), ("Exp", {})],
)
def test_what_needs_the_range_of_float32_keeps_it(operator: str, attributes: dict[str, int], tmp_path: Path) -> None:
    graph = Graph()
    x = convolution(graph, "input", "a")
    graph.node("Relu", [graph.node(operator, [x], "wide", **attributes)], "end")
    proto, kept = rewritten(graph.save(tmp_path / "m.onnx", SHAPE, (None,) * 4))
    assert kept == {f"/wide/{operator}": f"{operator} needs the range of float32"}
    found = types(proto)
    (node,) = (node for node in proto.graph.node if node.op_type == operator)
    assert {found[node.input[0]], found[node.output[0]]} == {TensorProto.FLOAT}
    (relu,) = (node for node in proto.graph.node if node.op_type == "Relu")
    assert found[relu.input[0]] == TensorProto.FLOAT16


def test_large_values_that_were_measured_stay_in_float32(tmp_path: Path) -> None:
    graph = Graph()
    x = convolution(graph, "input", "a")
    x = graph.node("Mul", [x, graph.constant("factor", np.float32(1e4))], "large")
    graph.node("Mul", [x, graph.constant("small", np.float32(1e-4))], "back")
    path = graph.save(tmp_path / "m.onnx", SHAPE, SHAPE)
    x = x_of()
    proto, kept = rewritten(path, batches=[{"input": x}])
    assert list(kept) == ["/large/Mul", "/back/Mul"]
    assert all(reason.startswith("large reaches ") for reason in kept.values())
    (found,) = session(proto.SerializeToString()).run(None, {"input": x})
    assert np.isfinite(found).all()
    _, unmeasured = rewritten(path)
    assert unmeasured == {}


def test_a_constant_that_float16_does_not_hold_keeps_its_reader(tmp_path: Path) -> None:
    graph = Graph()
    x = convolution(graph, "input", "a")
    graph.node("Max", [x, graph.constant("least", np.float32(-1e30))], "masked")
    _, kept = rewritten(graph.save(tmp_path / "m.onnx", SHAPE, SHAPE))
    assert kept == {"/masked/Max": "least reaches 1e+30"}
    graph = Graph()
    x = convolution(graph, "input", "a")
    graph.node("Max", [x, graph.constant("least", np.float32(-np.inf))], "masked")
    _, kept = rewritten(graph.save(tmp_path / "m.onnx", SHAPE, SHAPE))
    assert kept == {}


def test_a_scale_that_float16_does_not_hold_keeps_its_layer(tmp_path: Path) -> None:
    graph = Graph()
    scales = np.full(8, 0.01)
    scales[3] = 1e-6
    weights = graph.weights("w", (8, 8, 3, 3), scales=scales)
    padded = {"kernel_shape": [3, 3], "pads": [1] * 4}
    x = graph.node("Conv", [graph.quantized("input", "x"), weights], "tiny", **padded)
    convolution(graph, graph.node("Relu", [x], "relu"), "b")
    path = graph.save(tmp_path / "m.onnx", SHAPE, SHAPE)
    proto, kept = rewritten(path)
    assert kept == {"/tiny/Conv": "the scale of /w_dq/DequantizeLinear is below 6.1e-05"}
    x = x_of()
    (exact,), (found,) = (one.run(None, {"input": x}) for one in (session(path), session(proto.SerializeToString())))
    assert (sqnr_db(exact, found) or 99) > 35


def test_codes_that_are_read_in_both_types_are_dequantized_twice(tmp_path: Path) -> None:
    graph = Graph()
    x = graph.quantized("input", "x")
    half = graph.node("Relu", [x], "half")
    wide = graph.node("Softmax", [x], "wide", axis=1)
    graph.node("Add", [half, wide], "sum")
    proto, _ = rewritten(graph.save(tmp_path / "m.onnx", SHAPE, SHAPE))
    found = types(proto)
    made = [found[node.output[0]] for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    assert sorted(made) == [TensorProto.FLOAT, TensorProto.FLOAT16]
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    assert all(makers[node.input[0]] != "DequantizeLinear" for node in proto.graph.node if node.op_type == "Cast")


def test_what_the_operators_take_in_float32_only_stays(tmp_path: Path) -> None:
    graph = Graph()
    x = convolution(graph, "input", "a")
    scales = graph.constant("scales", np.array([1, 1, 2, 2], np.float32))
    x = graph.node("Resize", [x, "", scales], "up", mode="nearest")
    whole = graph.node("Cast", [x], "whole", to=TensorProto.INT32)
    graph.node("Cast", [whole], "back", to=TensorProto.FLOAT)
    graph.node("Relu", ["back"], "end")
    proto, kept = rewritten(graph.save(tmp_path / "m.onnx", SHAPE, (2, 8, 32, 32)))
    assert kept == {"/back/Cast": "integers may be larger than half precision holds exactly"}
    found = types(proto)
    assert found["scales"] == found["back"] == TensorProto.FLOAT
    assert found["up"] == TensorProto.FLOAT16


def test_an_operator_that_tensorrt_refuses_in_bfloat16_stays(tmp_path: Path) -> None:
    graph = Graph()
    graph.node("HardSwish", [convolution(graph, "input", "a")], "gate")
    path = graph.save(tmp_path / "m.onnx", SHAPE, SHAPE)
    assert rewritten(path)[1] == {}
    assert rewritten(path, "bfloat16")[1] == {"/gate/HardSwish": "TensorRT has no HardSwish in bfloat16"}


def layers_in_fp32(path: Path) -> list[tuple[str, ...]]:
    """The ONNX nodes of each layer that writes FP32, as TensorRT-RTX builds it."""
    audit = build(find_toolkit("tensorrt-rtx"), path, BuildSettings(capabilities=("8.9",))).audit
    assert all(one.node.endswith("qkv") for one in audit.broken)  # which TensorRT-RTX computes in float
    return [layer.onnx_nodes for layer in audit.layers if layer.writes_fp32]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 1}),
        pytest.param("convnext_atto", {"depths": (1, 1, 1, 1)}, marks=pytest.mark.slow),
    ],
)
def test_no_layer_is_fp32_that_is_not_listed(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    with one_thread():
        network = timm.create_model(name, num_classes=10, **options).eval()
        for weight in network.parameters():  # as trained ones are: some begin at 1e-6
            weight.data = torch.where(weight.abs().max() < 1e-3, torch.full_like(weight, 0.1), weight)
        model = prepare(network, input_shape=(3, 64, 64))
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        calibrate_ranges(model, [x])
        path = tmp_path / "m.onnx"
        sidecar = export_onnx(model, path, images=x, float_type="float16")
    kept = Counter(one["reason"].split()[0] for one in sidecar.details["kept_float32"])
    assert set(kept) <= {"LayerNormalization", "Softmax"}
    assert lint_onnx(path) == []
    listed = {one["node"] for one in sidecar.details["kept_float32"]}
    layers = layers_in_fp32(path)
    assert layers  # the output, at least
    for nodes in layers:
        assert listed & set(nodes) or any("/Cast" in node for node in nodes), nodes
    assert sidecar.figures["parity"]["layers"]
    assert min(one["sqnr_db"] or 99 for one in sidecar.figures["parity"]["layers"][:-1]) > 45


def test_the_file_is_named_after_the_type_and_a_float_file_has_none(tmp_path: Path) -> None:
    model = prepare(torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU()).eval(), input_shape=(3, 16, 16))
    calibrate_ranges(model, [torch.randn(2, 3, 16, 16)])
    with pytest.raises(UserError, match="--precision float16 computes nothing in INT8: leave out --float-type"):
        export_onnx(model, tmp_path / "m.onnx", precision="float16", float_type="float16")
    sidecar = export_onnx(model, tmp_path / "m.onnx", float_type="bfloat16")
    assert sidecar.details["float_type"] == "bfloat16"


def above(proto: onnx.ModelProto, name: str) -> list[str]:
    """The operators on the way up from a tensor, along first inputs."""
    makers = {output: node for node in proto.graph.node for output in node.output}
    found = []
    while name in makers:
        found.append(makers[name].op_type)
        name = makers[name].input[0]
    return found


def test_a_weight_that_is_transposed_reaches_a_float32_product_without_a_cast(tmp_path: Path) -> None:
    graph = Graph()
    weights = graph.node("Transpose", [graph.weights("w", (8, 8))], "turned", perm=[1, 0])
    x = graph.node("MatMul", [graph.quantized("input", "x"), weights], "product")
    graph.node("Mul", [x, graph.constant("factor", np.float32(1e-3))], "end")
    path = graph.save(tmp_path / "m.onnx", (2, 8), (2, 8))
    proto, kept = rewritten(path, batches=[{"input": np.full((2, 8), 1e6, np.float32)}])
    assert "/product/MatMul" not in kept or kept["/product/MatMul"]
    (product,) = (node for node in proto.graph.node if node.op_type == "MatMul")
    assert above(proto, product.input[1])[:2] == ["Transpose", "DequantizeLinear"]
    assert len({types(proto)[name] for name in product.input}) == 1


def test_moved_codes_that_are_read_in_both_types_are_moved_twice(tmp_path: Path) -> None:
    graph = Graph()
    moved = graph.node("Transpose", [graph.quantized("input", "x")], "moved", perm=[0, 1, 3, 2])
    half, wide = graph.node("Relu", [moved], "half"), graph.node("Softmax", [moved], "wide", axis=1)
    graph.node("Add", [half, wide], "sum")
    path = graph.save(tmp_path / "m.onnx", SHAPE, SHAPE)
    proto, _ = rewritten(path)
    for node in proto.graph.node:
        if node.op_type == "Cast":
            assert "DequantizeLinear" not in above(proto, node.input[0])[:2]
    x = x_of()
    (exact,), (found,) = (one.run(None, {"input": x}) for one in (session(path), session(proto.SerializeToString())))
    assert (sqnr_db(exact, found) or 99) > 30  # the scale is rounded, so some codes are others


def test_what_keeps_from_dividing_by_zero_still_does(tmp_path: Path) -> None:
    graph = Graph()
    x = convolution(graph, "input", "a")
    length = graph.node("ReduceL2", [x, graph.constant("axes", np.array([1]))], "length", keepdims=1)
    guarded = graph.node("Clip", [length, graph.constant("least", np.float32(1e-12))], "guarded")
    graph.node("Div", [x, guarded], "direction")
    proto, kept = rewritten(graph.save(tmp_path / "m.onnx", SHAPE, SHAPE))
    assert {"/guarded/Clip", "/direction/Div"} <= set(kept)
    (found,) = session(proto.SerializeToString()).run(None, {"input": np.zeros(SHAPE, np.float32)})
    assert np.isfinite(found).all()


def test_large_integers_do_not_pass_through_half_precision(tmp_path: Path) -> None:
    graph = Graph()
    x = convolution(graph, "input", "a")
    graph.node("Cast", [graph.constant("numbers", np.full(SHAPE, 100_001))], "count", to=TensorProto.FLOAT)
    whole = graph.node("Cast", [graph.node("Mul", [x, "count"], "many")], "whole", to=TensorProto.INT64)
    back = graph.node("Cast", [whole], "back", to=TensorProto.FLOAT)
    graph.node("Mul", [back, graph.constant("factor", np.float32(1e-4))], "end")
    path = graph.save(tmp_path / "m.onnx", SHAPE, SHAPE)
    x_N = x_of()
    proto, _ = rewritten(path, batches=[{"input": x_N}])
    (exact,), (found,) = (one.run(None, {"input": x_N}) for one in (session(path), session(proto.SerializeToString())))
    assert (sqnr_db(exact, found) or 99) > 30


def test_one_value_that_is_two_outputs_keeps_its_name(tmp_path: Path) -> None:
    path = residual(tmp_path / "m.onnx")
    model = ir.load(path)
    model.graph.outputs.append(model.graph.outputs[0])
    store_floats_as(model, "float16", [])
    assert [value.name for value in model.graph.outputs] == ["logits", "logits"]
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.FLOAT}


def test_a_scale_never_becomes_zero(tmp_path: Path) -> None:
    graph = Graph()
    again = graph.quantized(graph.quantized("input", "x", 1e-9), "y", 1e-9)
    graph.node("Relu", [again], "end")
    proto, _ = rewritten(graph.save(tmp_path / "m.onnx", SHAPE, SHAPE))
    scales = [onnx.numpy_helper.to_array(one) for one in proto.graph.initializer if "scale" in one.name]
    assert {float(one) for one in scales} == {float(np.float32(1e-9))}


def test_a_network_with_branches_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["input"], ["inside"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, SHAPE)],
    )
    graph = Graph()
    convolution(graph, "input", "a")
    graph.constant("condition", np.array(True))
    graph.nodes.append(helper.make_node("If", ["condition"], ["out"], then_branch=branch, else_branch=branch))
    path = graph.save(tmp_path / "m.onnx", SHAPE, SHAPE)
    with pytest.raises(UserError, match=r"branches or loops .*leave out --float-type"):
        store_floats_as(ir.load(path), "float16", [])


def test_bytes_are_normalized_in_float32(tmp_path: Path) -> None:
    proto, kept = rewritten(residual(tmp_path / "m.onnx", from_bytes=True))
    assert {"/cast/Cast", "/scaled/Mul", "/image/Add"} <= set(kept)
    assert set(kept.values()) == {"bytes are normalized in float32"}
    assert sum(node.op_type == "Cast" for node in proto.graph.node) == 2  # of the bytes, and before the output


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    model = prepare(torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3)).eval(), input_shape=(3, 16, 16))
    with pytest.raises(UserError, match="--weights float has no bfloat16"):
        export_onnx(model, tmp_path / "m.onnx", weights="float", float_type="bfloat16")


def test_a_float_file_is_quantized_with_the_rest_in_half_precision(tmp_path: Path) -> None:
    path, x = residual(tmp_path / "m.onnx", quantize=False), x_of((8, 3, 32, 32))
    sidecar = quantize_onnx(path, tmp_path / "q.onnx", inputs=x, float_type="float16")
    assert (sidecar.details["float_type"], sidecar.details["kept_float32"]) == ("float16", [])
    proto = onnx.load(tmp_path / "q.onnx")
    found = types(proto)
    assert {found[node.output[0]] for node in proto.graph.node if node.op_type == "Conv"} == {TensorProto.FLOAT16}
    assert lint_onnx(tmp_path / "q.onnx") == []
    assert sidecar.figures["parity"]["sqnr_db"] > 20
    assert len(layers_in_fp32(tmp_path / "q.onnx")) == 1
