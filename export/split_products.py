"""Makes one linear layer of an ONNX file whose output is only cut into parts several layers, as q, k and v.

What export/split_projections.py does for networks from PyTorch, and for the same reason. Needs no torch.
"""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx.reference import ReferenceEvaluator

from export.names import SPLIT, all_names, unused_name
from export.onnx_network import constant
from export.projection_parts import Part, are_whole, part_of
from qat.graph.operations import COMMUTING, kind_of_onnx

_BATCH = 2


def split_products(model: ir.Model) -> list[str]:
    """Splits them in a float network whose shapes are known, in place. Returns the names of the nodes it split."""
    done = []
    for node in list(model.graph):
        weight = constant(node.inputs[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.ndim != 2:
            continue
        end, bias = _with_bias(node, weight.shape[1])
        if parts := _parts(end):
            _split(model.graph, node, weight, bias, parts)
            done.append(node.name or node.outputs[0].name or "")
    if done:
        passes.RemoveUnusedNodesPass()(model)
        model.graph.sort()
        model.metadata_props[SPLIT] = json.dumps(done)
    return done


def _with_bias(node: ir.Node, width: int) -> tuple[ir.Value, np.ndarray | None]:
    """The layer's output, and the bias that is added to the product, if one is."""
    product = node.outputs[0]
    readers = product.consumers()
    if len(readers) == 1 and readers[0].op_type == "Add" and not product.is_graph_output():
        for value in readers[0].inputs:
            added = constant(value)
            if added is not None and added.shape == (width,):
                return readers[0].outputs[0], added
    return product, None


def _parts(end: ir.Value) -> list[tuple[ir.Value, Part]]:
    """The parts that a layer's output is cut into, in order; [] if it is not cut, or something else reads it."""
    if end.shape is None or end.is_graph_output():
        return []
    growing = [axis for axis, extent in enumerate(end.shape.dims) if not isinstance(extent, int)]
    if len(growing) != 1 or growing[0] == end.shape.rank() - 1:
        return []
    shape = [extent if isinstance(extent, int) else _BATCH for extent in end.shape.dims]
    movers: list[ir.Node] = []
    leaves: list[ir.Value] = []
    waiting = [end]
    while waiting:
        value = waiting.pop()
        moves = [_moves(reader, value) for reader in value.consumers()]
        if moves and all(moves):
            for reader in value.consumers():
                movers.append(reader)
                waiting += reader.outputs
        elif value is end or any(moves) or value.is_graph_output():
            return []
        else:
            leaves.append(value)
    found = []
    moved = _moved(end, shape, movers, leaves)
    if len(moved) < len(leaves):
        return []
    for leaf, positions in zip(leaves, moved, strict=True):
        part = part_of(positions, shape, growing[0])
        if part is None:
            return []
        found.append((leaf, part))
    found.sort(key=lambda one: one[1].features.start)
    return found if are_whole([part for _, part in found], shape[-1]) else []


def _moves(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node only moves the data of ``value``, in a way that constants say."""
    if kind_of_onnx(node.op_type, {}) not in COMMUTING or node.op_type not in _MOVERS:
        return False
    others = [given for given in node.inputs[1:] if given is not None]
    return node.inputs[0] is value and all(constant(given) is not None for given in others)


_MOVERS = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Gather", "Split", "Flatten", "Identity")


def _moved(end: ir.Value, shape: list[int], movers: list[ir.Node], leaves: list[ir.Value]) -> list[np.ndarray]:
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
    except (ValueError, RuntimeError, IndexError):  # what grows with the batch is a multiple of it
        return []


def _split(
    graph: ir.Graph, node: ir.Node, weight: np.ndarray, bias: np.ndarray | None, parts: list[tuple[ir.Value, Part]]
) -> None:
    taken = all_names(graph)
    name = node.name or node.outputs[0].name or "matmul"

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
