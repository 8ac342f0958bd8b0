"""Makes one linear layer of an ONNX file whose output is only cut into parts several layers, as q, k and v.

What export/split_projections.py does for networks from PyTorch, and for the same reason. Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx.reference import ReferenceEvaluator

from export.names import SPLIT, all_names, unused_name
from export.onnx_network import constant
from export.projection_parts import Part, are_whole, part_of
from export.shapes import measured_shapes
from qat.graph.operations import COMMUTING, kind_of_onnx


def split_products(model: ir.Model) -> list[str]:
    """Splits them in a float network whose shapes are known, in place. Returns the names of the nodes it split."""
    layers = [found for node in model.graph if (found := _layer(node)) is not None and _is_moved(found.end)]
    if not layers:
        return []
    shapes = measured_shapes(model, [layer.end for layer in layers])
    done = []
    for layer in layers:
        if layer.end in shapes and (parts := _parts(layer.end, *shapes[layer.end][:2])):
            _split(model.graph, layer, parts)
            done.append(layer.name)
    if done:
        passes.RemoveUnusedNodesPass()(model)
        model.graph.sort()
        model.metadata_props[SPLIT] = json.dumps(done)
    return done


@dataclass(frozen=True, eq=False)
class _Layer:
    """A product with a constant matrix [I, O], its bias [O], and its output."""

    node: ir.Node
    weight: np.ndarray
    bias: np.ndarray | None
    end: ir.Value

    @property
    def name(self) -> str:
        return self.node.name or self.node.outputs[0].name or "matmul"


def _layer(node: ir.Node) -> _Layer | None:
    weight = constant(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or weight.ndim != 2:
        return None
    product = node.outputs[0]
    if node.op_type == "Gemm":
        plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        turned = {name: node.attributes.get_int(name, 0) for name in ("transA", "transB")}
        if not plain or turned["transA"]:
            return None
        if turned["transB"]:
            weight = weight.T
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if (bias is None) != (len(node.inputs) < 3) or (bias is not None and bias.shape != (weight.shape[1],)):
            return None
        return _Layer(node, weight, bias, product)
    readers = product.consumers()
    if len(readers) == 1 and readers[0].op_type == "Add" and not product.is_graph_output():
        for value in readers[0].inputs:
            added = constant(value)
            if added is not None and added.shape == (weight.shape[1],):
                return _Layer(node, weight, added, readers[0].outputs[0])
    return _Layer(node, weight, None, product)


def _is_moved(value: ir.Value) -> bool:
    """Whether all that reads a value moves its data."""
    readers = value.consumers()
    return bool(readers) and not value.is_graph_output() and all(_moves(reader, value) for reader in readers)


def _parts(end: ir.Value, *shapes: Sequence[int]) -> list[tuple[ir.Value, Part]]:
    """The parts that a layer's output is cut into, in order; [] if it is not cut, or something else reads it.

    ``shapes``: of the output, for two batches.
    """
    movers: list[ir.Node] = []
    leaves: list[ir.Value] = []
    waiting = [end]
    while waiting:
        value = waiting.pop()
        if _is_moved(value):
            for reader in value.consumers():
                movers.append(reader)
                waiting += reader.outputs
        elif value.is_graph_output() or any(_moves(reader, value) for reader in value.consumers()):
            return []
        else:
            leaves.append(value)
    one, two = (_moved(end, shape, movers, leaves) for shape in shapes)
    found = []
    if len(one) < len(leaves) or len(two) < len(leaves):
        return []
    for leaf, *positions in zip(leaves, one, two, strict=True):
        first, second = (part_of(array, shape) for array, shape in zip(positions, shapes, strict=True))
        part = None if first is None or second is None else first.for_any_batch(second)
        if part is None:
            return []
        found.append((leaf, part))
    found.sort(key=lambda part: part[1].features.start)
    return found if are_whole([part for _, part in found], shapes[0][-1]) else []


def _moves(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node only moves the data of ``value``, in a way that constants say."""
    if kind_of_onnx(node.op_type, {}) not in COMMUTING or node.op_type not in _MOVERS:
        return False
    others = [given for given in node.inputs[1:] if given is not None]
    return node.inputs[0] is value and all(constant(given) is not None for given in others)


_MOVERS = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Gather", "Split", "Flatten", "Identity")


def _moved(end: ir.Value, shape: Sequence[int], movers: list[ir.Node], leaves: list[ir.Value]) -> list[np.ndarray]:
    """What the leaves are if the values of ``end`` are their positions."""
    constants = {value.name or "": constant(value) for node in movers for value in node.inputs[1:] if value is not None}
    name, helper = end.name or "", onnx.helper
    graph = helper.make_graph(
        [ir.to_proto(node) for node in movers],
        "moved",
        [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, shape)],
        [helper.make_tensor_value_info(leaf.name or "", onnx.TensorProto.INT64, None) for leaf in leaves],
        [onnx.numpy_helper.from_array(np.asarray(array), key) for key, array in constants.items()],
    )
    opset = end.graph.opset_imports.get("") if end.graph is not None else None
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset or onnx.defs.onnx_opset_version())])
    try:
        return list(ReferenceEvaluator(model).run(None, {name: np.arange(math.prod(shape)).reshape(shape)}))
    except (ValueError, RuntimeError, IndexError, TypeError):
        return []


def _split(graph: ir.Graph, layer: _Layer, parts: list[tuple[ir.Value, Part]]) -> None:
    taken = all_names(graph)
    node, weight, bias, name = layer.node, layer.weight, layer.bias, layer.name

    def stored(what: str, array: np.ndarray) -> ir.Value:
        unique = unused_name(what, taken)
        taken.add(unique)
        value = ir.Value(
            name=unique,
            const_value=ir.tensor(np.ascontiguousarray(array), name=unique),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
        )
        graph.register_initializer(value)
        return value

    def made(
        operator: str, inputs: list[ir.Value | None], what: str, shape: list[int | str], **attributes: list[int]
    ) -> ir.Value:
        unique = unused_name(what, taken)
        taken.add(unique)
        given = [ir.AttrInt64s(key, values) for key, values in attributes.items()]
        new = ir.Node("", operator, inputs, given, name=unique)
        graph.insert_after(node, new)
        output = new.outputs[0]
        output.name, output.dtype, output.shape = unique, ir.DataType.from_numpy(weight.dtype), ir.Shape(shape)
        return output

    rows = [extent if isinstance(extent, int) else "batch" for extent in (node.outputs[0].shape or ())][:-1]
    for number, (leaf, part) in enumerate(parts):
        own, width = f"{name}.{number}", len(part.features)
        chosen = slice(part.features.start, part.features.stop)
        value = made("MatMul", [node.inputs[0], stored(f"{own}.weight", weight[:, chosen])], own, [*rows, width])
        if bias is not None:
            value = made("Add", [value, stored(f"{own}.bias", bias[chosen])], f"{own}_add", [*rows, width])
        shape: list[int | str] = [extent if extent > 0 else "batch" for extent in part.shape]
        lengths, order = stored(f"{own}_shape", np.array(part.shape, np.int64)), list(part.order)
        shaped = made("Reshape", [value, lengths], f"{own}_reshape", shape)
        moved = made("Transpose", [shaped], f"{own}_transpose", [shape[axis] for axis in order], perm=order)
        leaf.replace_all_uses_with(moved)
