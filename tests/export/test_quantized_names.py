"""Names in what export.quantize writes: unique, whatever the float file calls its nodes and tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_graphs import Graph, save

from export.from_float_onnx import quantize_onnx
from export.linter import lint_onnx
from export.session import run, session, sqnr_db

WEIGHTS = pytest.mark.parametrize("weights", ["int8", "float"])


def quantized(model: onnx.ModelProto, folder: Path, weights: str = "int8") -> onnx.ModelProto:
    """``model`` in INT8: its names are unique, TensorRT's rules hold, and it answers nearly what the float one does."""
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    x = np.random.default_rng(0).standard_normal((32, *shape)).astype(np.float32)
    source, output = save(model, folder / "float.onnx"), folder / "int8.onnx"
    quantize_onnx(source, output, inputs=x, weights=weights)
    found = onnx.load(output)
    nodes = [node.name for node in found.graph.node if node.name]
    tensors = [name for node in found.graph.node for name in node.output]
    tensors += [value.name for value in (*found.graph.input, *found.graph.initializer)]
    assert len(set(nodes)) == len(nodes)
    assert len(set(tensors)) == len(tensors)
    assert lint_onnx(output) == []
    unique = onnx.load(source)
    for node in unique.graph.node:
        node.name = ""
    exact, rounded = (run(session(one.SerializeToString()), x) for one in (unique, found))
    assert exact.keys() == rounded.keys()
    noise = [sqnr_db(exact[name], rounded[name]) for name in exact]
    assert all(one is not None and one > 25 for one in noise), noise
    return found


def codes(model: onnx.ModelProto, op: str) -> list[tuple[str, np.ndarray, int]]:
    """Of the weight of each ``op``: the name of its codes, their scales, and the axis of these."""
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = [makers[node.input[1]] for node in model.graph.node if node.op_type == op]
    return [(node.input[0], constants[node.input[1]], node.attribute[0].i) for node in found]


@WEIGHTS
def test_a_weight_of_layers_with_different_output_axes_gets_codes_for_each(tmp_path: Path, weights: str) -> None:
    graph = Graph()
    w = graph.random("w", (32, 32))
    a = graph.node("Gemm", ["x", w], "a", transB=1)
    graph.node("MatMul", [graph.node("Gemm", [a, w], "b", transB=0), w], "y")
    model = graph.model(("N", 32), opset=17)
    for node in model.graph.node:
        node.name = ""
    found = quantized(model, tmp_path, weights)
    if weights == "int8":
        (rows, columns), (product,) = codes(found, "Gemm"), codes(found, "MatMul")
        assert (rows[0], columns[0], product[0]) == ("w.codes", "w.codes_1", "w.codes_1")
        for (_, scales, axis), along in ((rows, 0), (columns, 1)):
            assert axis == along
            np.testing.assert_allclose(scales, np.abs(graph.initializers["w"]).max(1 - along) / 127)


@WEIGHTS
def test_a_weight_of_two_convolutions_is_stored_once(tmp_path: Path, weights: str) -> None:
    graph = Graph()
    w = graph.random("w", (16, 16, 3, 3))
    x = graph.node("Relu", [graph.node("Conv", ["x", w], "one", pads=[1] * 4)], "relu")
    graph.node("Conv", [x, w], "two", pads=[1] * 4)
    found = quantized(graph.model(opset=17), tmp_path, weights)
    if weights == "int8":
        assert [name for name, *_ in codes(found, "Conv")] == ["w.codes", "w.codes"]


@WEIGHTS
def test_names_that_the_file_has_already_are_not_taken(tmp_path: Path, weights: str) -> None:
    graph = Graph()
    w, other = graph.random("w", (16, 16, 3, 3)), graph.random("w.codes", (16, 16, 3, 3))
    bias = graph.random("x.zero_point", (16, 1, 1))
    x = graph.node("Conv", ["x", w], "x/quantize", ["w/dequantize"], pads=[1] * 4)
    x = graph.node("Relu", [x], "w.scale", ["x/dequantize"])
    x = graph.node("Conv", [x, other], "w_quantized", ["x.scale"], pads=[1] * 4)
    graph.node("Add", [x, bias], "w.codes/dequantize", ["w.codes_1"])
    quantized(graph.model(opset=17), tmp_path, weights)


def test_nodes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    graph = Graph()
    parts = [graph.node("Split", ["x"], "s", ["a", "b"], axis=1), "b"]
    x = graph.node("Conv", [parts[0], graph.random("v", (8, 8, 1, 1))], "s", ["c"])
    more = [graph.node("Split", [x], "s", ["d", "e"], axis=1), "e"]
    x = graph.node("Concat", [*more, parts[1]], "", ["f"], axis=1)
    graph.node("Conv", [x, graph.random("w", (16, 16, 3, 3))], "s", ["y"])
    found = quantized(graph.model(opset=17), tmp_path)
    assert [node.op_type for node in found.graph.node].count("DequantizeLinear") == 5
    for node in found.graph.node:
        node.name = "s"
    assert lint_onnx(save(found, tmp_path / "one-name.onnx")) == []
