"""GELU of several operators: in which forms it is one operation of the view, and where it is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx_graphs import Graph, save

from export.onnx_network import network_from_onnx
from export.read import read_onnx


def number(graph: Graph, value: float) -> str:
    return graph.constant(f"number {value}", np.float32(value))


def erf(graph: Graph, x: str, operator: str = "Div") -> str:
    """1 + Erf(x / sqrt(2))."""
    inner = graph.node(operator, [x, number(graph, 2**0.5 if operator == "Div" else 0.5**0.5)], f"{x} inner")
    return graph.node("Add", [graph.node("Erf", [inner], f"{x} erf"), number(graph, 1)], f"{x} bent")


def tanh(graph: Graph, x: str) -> str:
    """1 + Tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)), with the power as one operator."""
    cube = graph.node("Mul", [graph.node("Pow", [x, number(graph, 3)], f"{x} cube"), number(graph, 0.044715)], f"{x} p")
    inner = graph.node("Mul", [graph.node("Add", [x, cube], f"{x} sum"), number(graph, 0.7978845)], f"{x} inner")
    return graph.node("Add", [number(graph, 1), graph.node("Tanh", [inner], f"{x} tanh")], f"{x} bent")


def half_behind(graph: Graph, x: str, bent: str) -> str:
    return graph.node("Mul", [graph.node("Mul", [x, bent], f"{x} product"), number(graph, 0.5)], "gelu")


def half_before(graph: Graph, x: str, bent: str) -> str:
    return graph.node("Mul", [bent, graph.node("Mul", [number(graph, 0.5), x], f"{x} half")], "gelu")


def divided_by_two(graph: Graph, x: str, bent: str) -> str:
    return graph.node("Mul", [graph.node("Div", [x, number(graph, 2)], f"{x} half"), bent], "gelu")


def half_of_the_bent(graph: Graph, x: str, bent: str) -> str:
    return graph.node("Mul", [x, graph.node("Mul", [number(graph, 0.5), bent], f"{x} half")], "gelu")


@pytest.mark.parametrize("half", [half_behind, half_before, divided_by_two, half_of_the_bent])
@pytest.mark.parametrize("bend", [erf, lambda graph, x: erf(graph, x, "Mul"), tanh], ids=["erf", "erf mul", "tanh"])
def test_it_is_one_activation(tmp_path, bend: Callable[[Graph, str], str], half: Callable[[Graph, str, str], str]):
    graph = Graph()
    x = graph.conv("x", "conv", 16, 16, quantized=False)
    gelu = half(graph, x, bend(graph, x))
    graph.conv(gelu, "last", 16, 16, quantized=False)
    view = network_from_onnx(read_onnx(save(graph.model(), tmp_path / "m.onnx")))
    found = [(op.name, op.kind, op.inputs) for op in view.network if op.kind not in ("input", "output")]
    assert found == [
        ("conv", "convolution", ("x",)),
        ("gelu", "activation", ("conv",)),
        ("last", "convolution", ("gelu",)),
    ]
    assert view.network["gelu"].shape == (1, 16, 8, 8)
    assert view.nodes["gelu"].op_type == "Mul"


def kinds(graph: Graph, tmp_path, outputs: list[str] | None = None) -> dict[str, str]:
    model: onnx.ModelProto = graph.model(outputs=outputs)
    return {op.name: op.kind for op in network_from_onnx(read_onnx(save(model, tmp_path / "m.onnx"))).network}


def test_it_is_not_where_something_else_reads_what_is_inside(tmp_path):
    graph = Graph()
    half_behind(graph, "x", erf(graph, "x"))
    graph.node("Relu", ["x inner"], "relu")
    graph.node("Add", ["gelu", "relu"], "sum")
    assert kinds(graph, tmp_path)["x erf"] == "activation"


def test_it_is_not_where_what_is_inside_leaves_the_network(tmp_path):
    graph = Graph()
    half_behind(graph, "x", erf(graph, "x"))
    assert "x erf" in kinds(graph, tmp_path, ["gelu", "x bent"])


def test_it_is_not_a_product_of_two_tensors(tmp_path):
    graph = Graph()
    other = graph.node("Relu", ["x"], "relu")
    half_behind(graph, other, erf(graph, "x"))
    assert "x erf" in kinds(graph, tmp_path)


@pytest.mark.parametrize("operator", ["Erf", "Tanh"])
def test_a_bend_alone_is_an_activation(tmp_path, operator):
    graph = Graph()
    graph.node("Add", [graph.node(operator, ["x"], "bend"), number(graph, 1)], "sum")
    assert kinds(graph, tmp_path)["bend"] == "activation"
