"""Computes what no input of a network reaches, such as the mask of shifted windows: TensorRT fuses a constant one."""

from __future__ import annotations

import math

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from export.onnx_network import constants
from export.session import session

_MOST_BYTES = 1 << 28  # of all that is computed


def _bytes(value: ir.Value) -> int:
    """Of a computed tensor, as far as its extents are known; they tell before anything is computed."""
    if value.producer() is None or value.shape is None or value.dtype is None or not value.shape.is_static():
        return 0
    return math.prod(value.shape.numpy()) * value.dtype.bitwidth // 8


def fold_constants(model: ir.Model) -> None:
    """Makes every tensor that is computed from constants alone an initializer, in place, unless they are too large.

    Nodes that draw random numbers, and those with graphs inside, are left.
    """
    known = constants(model.graph)
    wanted = [
        value
        for node in model.graph
        for value in node.outputs
        if value in known and value.name and any(reader.outputs[0] not in known for reader in value.consumers())
    ]
    names = {value.name for value in known}
    proto = ir.to_proto(model)
    inside = [node for node in proto.graph.node if names.issuperset(filter(None, node.output))]
    odd = any("Random" in node.op_type or any(one.HasField("g") for one in node.attribute) for node in inside)
    if not wanted or odd or sum(map(_bytes, known)) > _MOST_BYTES:
        return
    read = {name for node in inside for name in node.input}
    graph = onnx.helper.make_graph(
        inside,
        "constants",
        [],
        [onnx.ValueInfoProto(name=value.name) for value in wanted],
        [tensor for tensor in proto.graph.initializer if tensor.name in read],
    )
    alone = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    found = session(alone.SerializeToString()).run(None, {})
    if sum(array.nbytes for array in found) > _MOST_BYTES:
        return
    for value, array in zip(wanted, found, strict=True):
        stored = ir.Value(
            name=f"{value.name}_folded",
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, name=f"{value.name}_folded"),
        )
        model.graph.register_initializer(stored)
        value.replace_all_uses_with(stored)
    passes.RemoveUnusedNodesPass()(model)
