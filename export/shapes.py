"""Shapes of a graph's tensors: those that inference does not find, and what computes them in the graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export.names import unused_name
from export.session import session_with_tensors

_BATCHES = (2, 3, 7)
_TO_THE_END = np.iinfo(np.int64).max  # the end of a Slice of any length
# How large what they give is depends on the values that they get, or is not the same at each step.
_BY_VALUE = ("NonZero", "NonMaxSuppression", "Unique", "Compress", "Loop", "If", "Scan")


def find_shapes(model: ir.Model) -> None:
    """States the shapes of all tensors, in place, where only the first axis of the inputs is not known.

    What inference does not find is measured: ONNX Runtime runs the network for several batch sizes. Extents that depend
    on values are not stated.
    """
    ShapeInferencePass()(model)
    by_value: set[ir.Value] = set()
    for node in model.graph:
        if node.op_type in _BY_VALUE or not by_value.isdisjoint(value for value in node.inputs if value is not None):
            by_value.update(node.outputs)
    unknown = [
        value
        for node in model.graph
        for value in node.outputs
        if value.name and value not in by_value and not _known(value)
    ]
    for value, shapes in measured_shapes(model, unknown).items():
        if len({len(shape) for shape in shapes}) == 1:
            extents = zip(*shapes, strict=True)
            value.shape = ir.Shape([several[0] if len(set(several)) == 1 else "batch" for several in extents])


def measured_shapes(model: ir.Model, values: Sequence[ir.Value]) -> dict[ir.Value, list[tuple[int, ...]]]:
    """The shapes of some tensors for batches of 2, 3 and 7, or for the file's own; their types are stated.

    {} if another axis of an input is not known. Raises what ONNX Runtime raises.
    """
    given = [list(value.shape.dims if value.shape is not None else ()) for value in model.graph.inputs]
    if not values or any(not dims or not all(isinstance(one, int) for one in dims[1:]) for dims in given):
        return {}
    names = [value.name or "" for value in values]
    runner, random = session_with_tensors(ir.to_proto(model), names), np.random.default_rng(0)
    found: dict[ir.Value, list[tuple[int, ...]]] = {value: [] for value in values}
    for batch in _BATCHES:
        feeds = {}
        for value, dims in zip(model.graph.inputs, given, strict=True):
            extents = [one if isinstance(one, int) else batch for one in dims]
            dtype = (value.dtype or ir.DataType.FLOAT).numpy()
            feeds[value.name] = random.random(extents).astype(dtype)
        for value, array in zip(values, runner.run(names, feeds), strict=True):
            if isinstance(array, np.ndarray):
                found[value].append(array.shape)
                value.dtype = ir.DataType.from_numpy(array.dtype)
    return {value: shapes for value, shapes in found.items() if len(shapes) == len(_BATCHES)}


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
