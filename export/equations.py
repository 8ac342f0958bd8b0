"""Einsum equations in the letters that TensorRT's parser reads: small ones only, though ONNX has no such limit."""

from __future__ import annotations

import string

import onnx_ir as ir


def has_capitals(node: ir.Node) -> bool:
    """Whether the node is an Einsum whose equation has a capital letter."""
    return node.op_type == "Einsum" and not node.domain and not _equation(node).islower()


def lower_equations(graph: ir.Graph) -> None:
    """Gives the axes of such equations, by the order in which they appear, the letters a, b, c, ..."""
    for node in graph.all_nodes():
        if has_capitals(node):
            equation = _equation(node)
            axes = dict.fromkeys(letter for letter in equation if letter.isalpha())
            letters: dict[str, str | int | None] = dict(zip(axes, string.ascii_lowercase, strict=False))
            if len(axes) <= len(letters):
                node.attributes["equation"] = ir.AttrString("equation", equation.translate(str.maketrans(letters)))


def _equation(node: ir.Node) -> str:
    return node.attributes["equation"].as_string()
