"""Names in a graph, and names that are not taken yet."""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

SPLIT = "split_layers"
"""The metadata of layers that were made several (export/split_projections.py): their paths, as JSON."""


def unused_name(name: str, taken: Container[str]) -> str:
    """``name``, or ``name_1``, ``name_2``, ...: the first of these that is not ``taken``."""
    serial, unique = 0, name
    while unique in taken:
        serial += 1
        unique = f"{name}_{serial}"
    return unique


def all_names(graph: ir.Graph) -> set[str]:
    """The names of all nodes and tensors, with those of the graphs inside nodes."""
    nodes = list(graph.all_nodes())
    values = [value for inner in (graph, *graph.subgraphs()) for value in (*inner.inputs, *inner.initializers.values())]
    values += [value for node in nodes for value in node.outputs]
    return {node.name or "" for node in nodes} | {value.name or "" for value in values}
