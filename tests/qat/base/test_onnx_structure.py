"""Which ONNX files no parser may see; tiny.onnx and all exports may be seen."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import qdq_models
from onnx import TensorProto, helper, numpy_helper

from qat.base.errors import UserError
from qat.base.onnx_structure import DEEPEST_GRAPH, MOST_NODES, check_structure


def model_of(nodes: list[onnx.NodeProto], initializers: list[TensorProto] = [], **others: object) -> onnx.ModelProto:  # noqa: B006
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    return helper.make_model(helper.make_graph(nodes, "g", [image], [answer], initializers), **others)


def refused(path: Path, model: onnx.ModelProto | bytes) -> str:
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        check_structure(path)
    assert time.monotonic() - start < 10
    assert str(error.value).startswith(str(path))
    return str(error.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.onnx"


RELU = helper.make_node("Relu", ["x"], ["y"])


def test_what_is_right_is_taken(path: Path) -> None:
    for make in (qdq_models.convolution, qdq_models.classifier, qdq_models.residual, qdq_models.transposed_convolution):
        check_structure(make(path))


@pytest.mark.parametrize("kind", sorted(set(helper.get_all_tensor_dtypes()) - {TensorProto.UNDEFINED}))
def test_every_type_of_tensor_is_taken_whole_and_refused_with_too_few_values(path: Path, kind: int) -> None:
    values = [b"a"] * 6 if kind == TensorProto.STRING else [1] * 6
    tensor = helper.make_tensor("w", kind, [2, 3], values)
    path.write_bytes(model_of([RELU], [tensor]).SerializeToString())
    check_structure(path)
    tensor.dims[0] = 10**12
    assert "initializer w declares [1000000000000, 3]" in refused(path, model_of([RELU], [tensor]))


def test_functions_that_become_many_nodes_or_call_themselves(path: Path) -> None:
    def function(name: str, called: str, times: int = 2) -> onnx.FunctionProto:
        nodes = [helper.make_node(called, ["a"], ["b"], domain="my" if called != "Relu" else "") for _ in range(times)]
        return helper.make_function("my", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 20)])

    bomb = [function("f0", "Relu"), *(function(f"f{n}", f"f{n - 1}") for n in range(1, 30))]
    call = [helper.make_node("f29", ["x"], ["y"], domain="my")]
    assert "has 2,147,483,647 nodes once its functions are inlined" in refused(path, model_of(call, functions=bomb))
    circle = [function("f29", "f0", 1), function("f0", "f29", 1)]
    assert "functions that call each other more than" in refused(path, model_of(call, functions=circle))
    path.write_bytes(model_of(call, functions=[function("f29", "Relu")]).SerializeToString())
    check_structure(path)


def nested(depth: int) -> onnx.ModelProto:
    node = RELU
    for _ in range(depth):
        graph = helper.make_graph([node], "inner", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
        node = helper.make_node("If", ["x"], ["y"], then_branch=graph)
    return model_of([node])


def test_graphs_deep_within_each_other(path: Path) -> None:
    assert f"more than {DEEPEST_GRAPH} deep" in refused(path, nested(DEEPEST_GRAPH))
    path.write_bytes(nested(DEEPEST_GRAPH - 1).SerializeToString())
    check_structure(path)


def wrapped(content: bytes, times: int) -> bytes:
    """``content`` as a graph's node's attribute's graph, so many times: more than protobuf itself would write."""

    def field(number: int, inside: bytes) -> bytes:
        length, size = len(inside), b""
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + inside

    for _ in range(times):
        content = field(1, field(4, b"If") + field(2, b"y") + field(5, field(6, content)))
    return field(7, content)


def test_graphs_a_thousand_deep(path: Path) -> None:
    assert f"more than {DEEPEST_GRAPH} deep" in refused(path, wrapped(b"", 1000))


def test_nodes_without_an_operator_or_an_output(path: Path) -> None:
    assert "Relu node 'r' has no output" in refused(path, model_of([helper.make_node("Relu", ["x"], [], name="r")]))
    assert "node 0 (Relu) has no output" in refused(path, model_of([helper.make_node("Relu", ["x"], [""])]))
    assert "node 0 (unnamed) has no operator" in refused(path, model_of([helper.make_node("", ["x"], ["y"])]))


def test_many_nodes(path: Path) -> None:
    names = ["x", *(f"t{n}" for n in range(MOST_NODES)), "y"]
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in pairwise(names)]
    assert f"has {MOST_NODES + 1:,} nodes, of which {MOST_NODES:,} are read" in refused(path, model_of(nodes))
    path.write_bytes(model_of(nodes[:-1]).SerializeToString())
    check_structure(path)


def test_a_file_of_nothing_but_holes(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)  # a terabyte of zeros that takes no room on the disk
    with pytest.raises(UserError, match="is not an ONNX file"):
        check_structure(path)


def test_sparse_tensors(path: Path) -> None:
    model = model_of([RELU])
    values, places = (
        helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]),
        helper.make_tensor("i", TensorProto.INT64, [1], [7]),
    )
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [10**12]))
    assert "has sparse initializers" in refused(path, model)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    for path in (tmp_path / "pipe.onnx", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="is not a regular file"):
            check_structure(path)


@pytest.mark.parametrize("location", ["/etc/hostname", "../w.bin", "a/../../w.bin", "link.bin", "folder/w.bin", ""])
def test_external_data_outside_of_the_models_folder(tmp_path: Path, location: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(4))
    (inside / "link.bin").symlink_to(tmp_path / "w.bin")
    (inside / "folder").symlink_to(tmp_path)
    weight = numpy_helper.from_array(np.zeros(1, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    assert "the model's folder" in refused(inside / "m.onnx", model_of([RELU], [weight]))
    (inside / "own.bin").write_bytes(bytes(4))
    weight.external_data[0].value = "own.bin"
    (inside / "m.onnx").write_bytes(model_of([RELU], [weight]).SerializeToString())
    check_structure(inside / "m.onnx")
    os.mkfifo(inside / "pipe")
    weight.external_data[0].value = "pipe"
    assert "is not a regular file" in refused(inside / "m.onnx", model_of([RELU], [weight]))
