"""Shapes of a graph's tensors: those that inference does not find, and what computes them in the graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export.names import unused_name
from export.session import session_with_tensors

_BATCHES = (2, 3)
_TO_THE_END = np.iinfo(np.int64).max  # the end of a Slice of any length


def find_shapes(model: ir.Model) -> None:
    """States the shapes of all tensors, in place, where only the first axis of the inputs is not known.

    What inference does not find is measured: ONNX Runtime runs the network on zeros, for two batch sizes.
    """
    ShapeInferencePass()(model)
    unknown = {value.name: value for node in model.graph for value in node.outputs if value.name and not _known(value)}
    shapes = [list(value.shape.dims if value.shape is not None else ()) for value in model.graph.inputs]
    if not unknown or any(not dims or not all(isinstance(one, int) for one in dims[1:]) for dims in shapes):
        return
    names = [name for name in unknown if name]
    runner = session_with_tensors(ir.to_proto(model), names)
    found: list[list[np.ndarray]] = []
    for batch in _BATCHES:
        feeds = {}
        for value, dims in zip(model.graph.inputs, shapes, strict=True):
            extents = [one if isinstance(one, int) else batch for one in dims]
            feeds[value.name] = np.zeros(extents, (value.dtype or ir.DataType.FLOAT).numpy())
        found.append(runner.run(names, feeds))
    for name, one, two in zip(names, *found, strict=True):
        if one.ndim == two.ndim:
            value = unknown[name]
            value.shape = ir.Shape([a if a == b else "batch" for a, b in zip(one.shape, two.shape, strict=True)])
            value.dtype = ir.DataType.from_numpy(one.dtype)


def _known(value: ir.Value) -> bool:
    """Whether all extents but one are known."""
    return value.shape is not None and sum(not isinstance(extent, int) for extent in value.shape.dims) < 2


def simplify_shapes(graph: ir.Graph) -> None:
    """Makes the shape of each Reshape a constant, and cuts parts out of shapes by Slice.

    The exporter computes the shape of a Reshape in the graph. It cuts out a part of a shape by attributes of the Shape
    node, which TensorRT 8.6 ignores: it takes the whole shape and does not say so.
    """
    for node in list(graph):
        shape = node.outputs[0].shape
        if node.op_type == "Reshape" and shape is not None:
            lengths = [dim if isinstance(dim, int) else -1 for dim in shape]
            if lengths.count(-1) <= 1 and 0 not in lengths:
                node.replace_input_with(1, constant_of(graph, f"{node.outputs[0].name}_shape", lengths))
                node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        elif node.op_type == "Shape" and {"start", "end"} & node.attributes.keys():
            start = node.attributes.pop("start", ir.AttrInt64("start", 0)).as_int()
            end = node.attributes.pop("end", ir.AttrInt64("end", _TO_THE_END)).as_int()
            whole = node.outputs[0]
            readers = whole.uses()
            bounds = [constant_of(graph, f"{whole.name}_{name}", [at]) for name, at in (("start", start), ("end", end))]
            part = ir.Node("", "Slice", [whole, *bounds, constant_of(graph, f"{whole.name}_axis", [0])])
            part.metadata_props.update(node.metadata_props)
            graph.insert_after(node, part)
            for reader, index in readers:
                reader.replace_input_with(index, part.outputs[0])


def drop_expands(graph: ir.Graph) -> None:
    """Removes each Expand whose readers would broadcast anyway, because their other input has the expanded shape."""
    for node in list(graph):
        if node.op_type == "Expand" and not node.outputs[0].is_graph_output():
            given, expanded = node.inputs[0], node.outputs[0]
            readers = expanded.consumers()
            if given is not None and readers and all(_broadcasts(reader, expanded) for reader in readers):
                expanded.replace_all_uses_with(given)
                graph.remove(node, safe=True)


def _broadcasts(node: ir.Node, expanded: ir.Value) -> bool:
    """Whether a node is a pointwise function of ``expanded`` and another tensor of its shape."""
    others = [value for value in node.inputs if value is not expanded and value is not None]
    known = expanded.shape is not None and len(others) == 1 and others[0].shape is not None
    return node.op_type in ("Add", "Sub", "Mul", "Div") and known and others[0].shape == expanded.shape


def constant_of(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    """A new int64 [len(values)] constant of ``graph``."""
    constant = ir.Value(name=unused_name(name, graph.initializers), const_value=ir.tensor(np.array(values, np.int64)))
    graph.register_initializer(constant)
    return constant
