"""The view of ONNX graphs: what is an operation, a constant or a size, what is read quantized; and that of torch.fx."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import Graph, save
from torch import nn

from export.onnx_network import OnnxNetwork, constant, network_from_onnx
from export.read import read_onnx
from qat.graph.network import ConstantWeight, Network
from qat.graph.tracing import network_of, trace
from qat.rules.place import place


@pytest.fixture
def view(tmp_path: Path):
    def read(model: onnx.ModelProto) -> OnnxNetwork:
        return network_from_onnx(read_onnx(save(model, tmp_path / "m.onnx")))

    return read


def shown(view: OnnxNetwork) -> dict[str, tuple[str, tuple[str, ...]]]:
    """operation -> its kind and what it reads"""
    return {op.name: (op.kind, op.inputs) for op in view.network}


def dequantizers(view: OnnxNetwork) -> dict[tuple[str, str], list[str | None]]:
    return {read: [node.name for node in nodes] for read, nodes in view.reads.items()}


# --- Q and DQ


def test_q_and_dq_are_left_out_and_noted_as_reads(view):
    graph = Graph()
    skip = graph.qdq("x", 0.25)
    y = graph.node("Relu", [graph.conv(skip, "conv1", 16, 16)], "relu")
    y = graph.conv(y, "conv2", 16, 16, quantized=False)
    graph.node("Add", [y, skip], "add")
    found = view(graph.model())
    assert shown(found) == {
        "x": ("input", ()),
        "conv1": ("convolution", ("x",)),
        "relu": ("activation", ("conv1",)),
        "conv2": ("convolution", ("relu",)),
        "add": ("add", ("conv2", "x")),
        "output add": ("output", ("add",)),
    }
    assert dequantizers(found) == {("conv1", "x"): ["x/dequantize"], ("add", "x"): ["x/dequantize"]}
    assert found.scale("conv1", "x") == found.scale("add", "x") == 0.25
    assert found.scale("conv2", "relu") is None
    assert {op: node.name for op, node in found.weights.items()} == {"conv1": "conv1.w/dequantize"}
    assert found.nodes["conv1"].op_type == "Conv"
    assert found.network["conv1"].weight == ConstantWeight("conv1.w", 16, 16, 1, (3, 3), (1, 1))
    assert found.network["conv1"].shape == (1, 16, 8, 8)


def test_pairs_in_a_row_are_one_read_by_the_nearest_scale(view):
    graph = Graph()
    graph.conv(graph.qdq(graph.qdq("x", 0.5, "far"), 0.25, "near"), "conv", 16, 16)
    found = view(graph.model())
    assert dequantizers(found) == {("conv", "x"): ["near/dequantize", "far/dequantize"]}
    assert found.scale("conv", "x") == 0.25


def test_codes_from_outside_and_codes_in_between(view):
    graph = Graph()
    given = [graph.constant("scale", np.float32(0.25)), graph.constant("zero", np.int8(0))]
    pooled = graph.node("MaxPool", ["x"], "pool", kernel_shape=[2, 2])
    graph.conv(graph.node("DequantizeLinear", [pooled, *given], "dequantize"), "conv", 16, 16)
    found = view(graph.model(dtype=TensorProto.INT8))
    assert shown(found)["pool"] == ("max_pool", ("x",))
    assert shown(found)["conv"] == ("convolution", ("pool",))
    assert dequantizers(found) == {("conv", "pool"): ["dequantize"]}


def test_an_output_may_be_read_through_dq(view):
    graph = Graph()
    graph.qdq(graph.conv("x", "conv", 16, 16, quantized=False))
    found = view(graph.model())
    assert shown(found)["output conv/dequantize"] == ("output", ("conv",))
    assert dequantizers(found) == {("output conv/dequantize", "conv"): ["conv/dequantize"]}


# --- weights


@pytest.mark.parametrize("op", ["Constant", "Identity", "Transpose", "Reshape"])
@pytest.mark.parametrize("quantized", [False, True])
def test_weights_behind_constants_and_data_movement(view, op, quantized):
    graph = Graph()
    shape = (16, 32) if op == "Transpose" else (32, 16)
    if op == "Constant":
        value = np.ones(shape, np.int8 if quantized else np.float32)
        weight = graph.node("Constant", [], "w", value=numpy_helper.from_array(value))
        if quantized:
            given = [graph.constant("s", np.full(32, 0.1, np.float32)), graph.constant("z", np.zeros(32, np.int8))]
            weight = graph.node("DequantizeLinear", [weight, *given], "w/dequantize", axis=0)
    else:
        weight = graph.codes("w", shape, 1 if op == "Transpose" else 0) if quantized else graph.random("w", shape)
        sizes = [graph.constant("sizes", np.array([32, 16]))] if op == "Reshape" else []
        weight = graph.node(op, [weight, *sizes], "moved")
    graph.node("Gemm", ["x", weight], "fc", transB=1)
    found = view(graph.model(("N", 16)))
    assert shown(found)["fc"] == ("linear", ("x",))
    assert found.network["fc"].weight == ConstantWeight("w", 16, 32)
    assert [node.name for node in found.weights.values()] == (["w/dequantize"] if quantized else [])


def test_channels_of_matrix_products_and_transposed_convolutions(view):
    graph = Graph()
    up = graph.node("ConvTranspose", ["x", graph.random("up.w", (16, 4, 2, 2))], "up", group=2)
    flat = graph.node("Flatten", [graph.node("GlobalAveragePool", [up], "pool")], "flat")
    product = graph.node("MatMul", [flat, graph.random("m.w", (8, 10))], "product")
    left = graph.node("MatMul", [graph.random("l.w", (6, 1)), product], "left")
    graph.node("Gemm", [left, graph.node("Relu", [product], "relu")], "of activations", transB=1)
    found = view(graph.model(("N", 16, 8, 8)))
    assert found.network["up"].weight == ConstantWeight("up.w", 16, 8, 2, (2, 2), (1, 1))
    assert found.network["product"].kind == "linear"
    assert found.network["product"].weight == ConstantWeight("m.w", 8, 10)
    assert (found.network["left"].kind, found.network["left"].weight) == ("matrix_product", None)
    assert found.network["of activations"].kind == "matrix_product"


def test_a_computed_weight_is_no_constant(view):
    graph = Graph()
    weight = graph.node("Mul", [graph.random("w", (16, 16, 1, 1)), graph.node("Exp", ["x"], "exp")], "scaled")
    graph.node("Conv", ["x", weight], "conv")
    found = view(graph.model((16, 16, 1, 1)))
    assert shown(found)["conv"] == ("convolution", ("x", "scaled"))
    assert found.network["conv"].weight is None


# --- constants and sizes


def test_what_is_computed_from_constants_alone_is_constant(view):
    graph = Graph()
    factor = graph.node("Sqrt", [graph.node("Constant", [], "two", value_float=2.0)], "root")
    graph.node("Mul", ["x", factor], "product")
    assert shown(view(graph.model())) == {
        "x": ("input", ()),
        "product": ("activation", ("x",)),
        "output product": ("output", ("product",)),
    }


def test_arithmetic_on_sizes_is_left_out(view):
    graph = Graph()
    batch = graph.node("Gather", [graph.node("Shape", ["x"], "shape"), graph.constant("zero", np.array(0))], "batch")
    batch = graph.node("Unsqueeze", [batch, graph.constant("axis", np.array([0]))], "batch1")
    sizes = graph.node("Concat", [batch, graph.constant("rest", np.array([-1]))], "sizes", axis=0)
    graph.node("Reshape", ["x", sizes], "flat")
    assert shown(view(graph.model())) == {
        "x": ("input", ()),
        "flat": ("data_movement", ("x",)),
        "output flat": ("output", ("flat",)),
    }


def test_initializers_that_are_inputs_too_are_constants(view):
    graph = Graph()
    graph.conv("x", "conv", 16, 16, quantized=False)
    model = graph.model(opset=8)
    model.graph.input.append(helper.make_tensor_value_info("conv.w", TensorProto.FLOAT, (16, 16, 3, 3)))
    found = view(model)
    assert list(found.network.ops) == ["x", "conv", "output conv"]
    assert found.network["conv"].weight == ConstantWeight("conv.w", 16, 16, 1, (3, 3), (1, 1))


def test_the_value_of_a_constant():
    def made(**attributes) -> np.ndarray | None:
        return constant(ir.from_proto(helper.make_node("Constant", [], ["c"], **attributes)).outputs[0])

    assert made(value=numpy_helper.from_array(np.arange(3))).tolist() == [0, 1, 2]
    assert (made(value_float=0.5), made(value_float=0.5).dtype) == (0.5, np.float32)
    assert made(value_ints=[1, 2]).tolist() == [1, 2]
    assert constant(None) is None
    assert constant(ir.Value(name="x")) is None


# --- operations


def test_every_part_of_a_split_is_a_tensor(view):
    graph = Graph()
    sizes = graph.constant("sizes", np.array([8, 8]))
    graph.node("Split", [graph.qdq("x"), sizes], "split", ["a", "b"], axis=1)
    graph.node("Add", ["a", "b"], "add")
    found = view(graph.model())
    assert shown(found) == {
        "x": ("input", ()),
        "split (all parts)": ("split", ("x",)),
        "a": ("data_movement", ("split (all parts)",)),
        "b": ("data_movement", ("split (all parts)",)),
        "add": ("add", ("a", "b")),
        "output add": ("output", ("add",)),
    }
    assert found.network["a"].shape == (1, 8, 8, 8)
    assert list(found.reads) == [("split (all parts)", "x")]


def test_operations_of_one_name_are_told_apart(view):
    graph = Graph()
    graph.node("Split", ["x"], "s", ["a", "b"], axis=1)
    graph.node("Split", [graph.qdq("a")], "s", ["c", "d"], axis=1)
    graph.node("Concat", ["b", "c"], "s", ["output e"], axis=1)
    graph.node("Relu", ["output e"], "s", ["e"])
    found = view(graph.model(outputs=["d", "e"]))
    assert shown(found) == {
        "x": ("input", ()),
        "s (all parts)": ("split", ("x",)),
        "a": ("data_movement", ("s (all parts)",)),
        "b": ("data_movement", ("s (all parts)",)),
        "s (all parts)_1": ("split", ("a",)),
        "c": ("data_movement", ("s (all parts)_1",)),
        "d": ("data_movement", ("s (all parts)_1",)),
        "output e": ("concat", ("b", "c")),
        "e": ("activation", ("output e",)),
        "output d": ("output", ("d",)),
        "output e_1": ("output", ("e",)),
    }
    assert list(found.reads) == [("s (all parts)_1", "a")]


def test_further_outputs_are_tensors_of_unknown_kind(view):
    graph = Graph()
    graph.node("TopK", ["x", graph.constant("k", np.array([1]))], "top", ["values", "indices"])
    graph.node("Add", ["values", graph.node("Cast", ["indices"], "cast", to=TensorProto.FLOAT)], "add")
    found = view(graph.model())
    assert shown(found)["values"] == shown(found)["indices"] == ("other", ("x",))
    assert shown(found)["add"] == ("add", ("values", "cast"))


def test_casts_between_floats_move_data_and_others_do_not(view):
    graph = Graph()
    half = graph.node("Cast", ["x"], "half", to=TensorProto.FLOAT16)
    graph.node("Cast", [half], "integer", to=TensorProto.INT32)
    found = view(graph.model(output_dtype=TensorProto.INT32))
    assert found.network["half"].kind == "data_movement"
    assert found.network["integer"].kind == "other"


def test_a_table_that_is_looked_up_in_is_no_data_movement(view):
    graph = Graph()
    graph.node("Gather", [graph.random("table", (10, 16)), "x"], "found")
    found = view(graph.model(("N", 4), dtype=TensorProto.INT64))
    assert shown(found)["found"] == ("other", ("x",))


@pytest.mark.parametrize(("axes", "kind"), [([2, 3], "global_pool"), ([-1, -2], "global_pool"), ([1], "other")])
@pytest.mark.parametrize("opset", [17, 20])
def test_a_mean_over_space_is_a_global_pool(view, axes, kind, opset):
    graph = Graph()
    if opset < 18:
        graph.node("ReduceMean", ["x"], "mean", axes=axes)
    else:
        graph.node("ReduceMean", ["x", graph.constant("axes", np.array(axes))], "mean")
    assert view(graph.model(opset=opset)).network["mean"].kind == kind


def test_what_a_subgraph_reads_from_outside_is_read(view):
    def tensor(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 16, 8, 8])

    graph = Graph()
    graph.node("Relu", ["x"], "relu")
    always = graph.constant("always", np.array(True))
    branch = helper.make_graph([helper.make_node("Neg", ["relu"], ["z"])], "branch", [], [tensor("z")])
    graph.node("If", [always], "if", then_branch=branch, else_branch=branch)
    found = view(graph.model())
    assert set(found.network["if"].inputs) == {"relu"}
    assert found.network["if"].kind == "other"


# --- the view of torch.fx


def decided(network: Network) -> tuple[int, int, Counter]:
    """Quantized tensors, their quantizers, and decisions by kind, outcome and rule."""
    placement = place(network)
    decisions = Counter((decision.kind, decision.quantized, decision.rule) for decision in placement.decisions)
    return len(placement.tensors), len({tensor.quantizer for tensor in placement.tensors}), decisions


def exported(model: nn.Module, path: Path, side: int) -> Path:
    """The float network as torch.onnx writes it."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (torch.zeros(2, 3, side, side),),
                path,
                dynamo=True,
                verbose=False,
                external_data=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    finally:
        logging.disable(previous)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "squeezenet1_1",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "mobilenet_v3_small",
                "shufflenet_v2_x1_0",
                "googlenet",
                "densenet121",
                "regnet_y_400mf",
                "convnext_tiny",
            )
        ),
    ],
)
def test_onnx_is_placed_as_torch_fx_is(name, tmp_path):
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model, side = torchvision.models.get_model(name, weights=None, **options).eval(), 64
    from_fx = network_of(trace(model, (3, side, side)))
    from_onnx = network_from_onnx(read_onnx(exported(model, tmp_path / "m.onnx", side))).network
    assert decided(from_onnx) == decided(from_fx)


def test_a_shape_that_is_not_known_is_none_and_no_reason_to_see_a_broadcast(view):
    graph = Graph()
    graph.node("Relu", ["x"], "relu")
    assert view(graph.model(("N", 8, "H", "W"))).network["relu"].shape is None
