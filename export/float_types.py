"""float32 ONNX -> a file whose layers that are not INT8 compute in float16 or bfloat16, where that is safe.

A strongly typed network takes every type from the file, so that a layer which the file leaves in float32 runs in FP32.
Types follow from the nodes: each is half or float32 (export/wide_nodes.py), and what the ONNX schema of its operator
lets an input be decides which inputs are half. Where a tensor is made in one type and read in another, a Cast stands
between. It never stands behind a DequantizeLinear: that, and what only moves its values, is written once for each type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export.names import unused_name
from export.onnx_network import DEQUANTIZE, QUANTIZE, constants
from export.session import run, session_with_tensors
from export.wide_nodes import FLOAT, HALF, HalfType, WideNodes, dequantizer_behind, largest_of, may_be_half
from qat.base.console import say
from qat.base.errors import UserError

# From these versions on the operators are the same, and take the type; some, Conv too, take bfloat16 only from 22 on.
_OPSETS: Mapping[HalfType, int] = {"float16": 20, "bfloat16": 22}
_IMAGES_MEASURED = 8


@dataclass(frozen=True)
class KeptFloat32:
    """A node that stays in float32, and why."""

    node: str
    reason: str


def store_floats_as(model: ir.Model, kind: HalfType, batches: Iterable[Mapping[str, np.ndarray]]) -> list[KeptFloat32]:
    """Rewrites ``model``, whose floats are float32, in place, so that what is not INT8 computes in ``kind``.

    ``batches`` are inputs by name, on the first few of which the largest values are measured. Returns the nodes that
    stay in float32, and says how many those are.

    Raises UserError when the model has branches or loops.
    """
    if any(one.type == ir.AttributeType.GRAPH for node in model.graph for one in node.attributes.values()):
        raise UserError("a network with branches or loops cannot be stored in half precision: leave out --float-type")
    ShapeInferencePass()(model)  # types that the file does not state
    kept = _HalfFloats(model, kind, largest_magnitudes(model, batches)).rewrite()
    reasons = Counter(one.reason for one in kept)
    why = [f"{count} ({reason})" for reason, count in reasons.most_common(3)] + ["..."] * (len(reasons) > 3)
    say(f"what is not INT8 computes in {kind}; nodes that stay in float32: {', '.join(why) or 'none'}")
    return kept


def largest_magnitudes(model: ir.Model, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """The largest magnitude of each float32 tensor that ``model`` makes of inputs, in ONNX Runtime."""
    known = constants(model.graph)
    made = [value for node in model.graph for value in node.outputs if value.dtype == FLOAT and value not in known]
    found = {str(value.name): 0.0 for value in made if value.name}
    running = None
    fixed = any(isinstance(one.shape[0], int) for one in model.graph.inputs if one.shape)
    for image in islice(batches if fixed else _images(batches), _IMAGES_MEASURED):
        running = running or session_with_tensors(ir.to_proto(model), found)
        for name, values in run(running, image).items():
            if name in found:
                found[name] = max(found[name], largest_of(values))
    return found


def _images(batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Mapping[str, np.ndarray]]:
    """One by one, because all tensors of an image are in memory at once."""
    for given in batches:
        for index in range(min(map(len, given.values()))):
            yield {name: x[index : index + 1] for name, x in given.items()}


class _HalfFloats:
    def __init__(self, model: ir.Model, kind: HalfType, largest: Mapping[str, float]) -> None:
        self._graph, self._kind, self._half = model.graph, kind, HALF[kind]
        self._opset = model.opset_imports[""] = max(model.opset_imports[""], _OPSETS[kind])
        self._wide = WideNodes(model.graph, kind, self._opset, largest)
        self._floats = {v for node in model.graph for v in (*node.inputs, *node.outputs) if v and v.dtype == FLOAT}
        self._names = {value.name or "" for node in model.graph for value in (*node.inputs, *node.outputs) if value}
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._carrying = {node for node in model.graph if dequantizer_behind(node.outputs[0]) is not None}
        """The DequantizeLinear nodes and what only moves their values: made in the types of their readers."""
        self._used: set[ir.Node] = set()
        self._given = {node: list(node.inputs) for node in self._carrying}  # what they read in the float32 network

    def rewrite(self) -> list[KeptFloat32]:
        nodes = list(self._graph)
        for node in nodes:
            if node.op_type == QUANTIZE:
                self._retype_quantizer(node)
            elif node not in self._carrying:
                self._retype(node, FLOAT if node in self._wide.reasons else self._half)
        outputs: dict[ir.Value, ir.Value] = {}
        for index, output in enumerate(self._graph.outputs):  # one value may be several outputs
            outputs[output] = outputs.get(output) or self._output(output)
            self._graph.outputs[index] = outputs[output]
        self._remove_unused()
        named = [node for node in nodes if node in self._wide.reasons and node not in self._carrying]
        return [KeptFloat32(node.name or node.op_type, self._wide.reasons[node]) for node in named]

    def _retype(self, node: ir.Node, type_: ir.DataType) -> None:
        """Makes the float inputs of ``node`` of ``type_`` as far as its schema allows, and its outputs what follows."""
        for index, value in enumerate(node.inputs):
            if value is not None and value in self._floats:
                as_half = type_ == self._half and may_be_half(node, index, self._kind, self._opset)
                node.replace_input_with(index, self._in_type(value, self._half if as_half else FLOAT))
        if type_ == FLOAT:
            return
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", type_)
        schema = onnx.defs.get_schema(node.op_type, self._opset)
        for index, value in enumerate(node.outputs):
            formal = schema.outputs[min(index, len(schema.outputs) - 1)]
            if value in self._floats and "(" not in formal.type_str:
                value.dtype = type_

    def _retype_quantizer(self, node: ir.Node) -> None:
        """A quantizer reads its tensor as it is; a 16-bit scale must have the tensor's type, and hold in it."""
        x, scale = node.inputs[0], node.inputs[1]
        assert x is not None
        assert scale is not None
        type_ = self._half if x.producer() in self._carrying or x.dtype == self._half else FLOAT
        if x.const_value is not None or self._wide.is_small(scale):
            type_ = FLOAT
        node.replace_input_with(0, self._in_type(x, type_))
        node.replace_input_with(1, self._scale(scale, type_))

    def _in_type(self, value: ir.Value, type_: ir.DataType) -> ir.Value:
        """``value`` in ``type_``: itself, a converted constant, another DequantizeLinear, or a Cast of it."""
        maker = value.producer()
        carried = maker is not None and maker in self._carrying
        if value.dtype == type_ and not carried:
            return value
        key = (value, type_)
        if key not in self._made:
            if value.const_value is not None:
                self._made[key] = self._constant(value, type_, value.const_value.numpy())
            elif maker is not None and carried:
                self._made[key] = self._carried(maker, type_)
            else:
                self._made[key] = self._cast(value, type_)
        return self._made[key]

    def _carried(self, node: ir.Node, type_: ir.DataType) -> ir.Value:
        """The output of a DequantizeLinear, or of what moves its values, in ``type_``: the node's, or a twin's."""
        output, inputs = node.outputs[0], list(self._given[node])
        index = 1 if node.op_type == DEQUANTIZE else 0
        given = inputs[index]
        assert given is not None
        inputs[index] = self._scale(given, type_) if index else self._in_type(given, type_)
        if node not in self._used:
            self._used.add(node)
            node.replace_input_with(index, inputs[index])
            output.dtype = type_
            return output
        name = self._unused(f"{output.name}.{type_.name.lower()}")
        made = ir.Value(name=name, type=ir.TensorType(type_), shape=output.shape)
        attributes = list(node.attributes.values())
        twin_name = self._unused(f"{node.name}.{type_.name.lower()}")
        self._graph.insert_after(node, ir.Node("", node.op_type, inputs, attributes, outputs=[made], name=twin_name))
        return made

    def _scale(self, scale: ir.Value, type_: ir.DataType) -> ir.Value:
        """A scale in ``type_``. In float32 it has the value that half precision gives it: both sides must agree."""
        key = (scale, type_)
        if key not in self._made:
            assert scale.const_value is not None
            array = scale.const_value.numpy()
            rounded = array if self._wide.is_small(scale) else array.astype(self._half.numpy())
            self._made[key] = self._constant(scale, type_, rounded)
        return self._made[key]

    def _constant(self, value: ir.Value, type_: ir.DataType, array: np.ndarray) -> ir.Value:
        name = self._unused(f"{value.name}.{type_.name.lower()}")
        tensor = ir.Tensor(array.astype(type_.numpy()), dtype=type_, name=name)
        made = ir.Value(name=name, type=ir.TensorType(type_), shape=tensor.shape, const_value=tensor)
        self._graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, type_: ir.DataType) -> ir.Value:
        name = self._unused(f"{value.name}.{type_.name.lower()}")
        made = ir.Value(name=name, type=ir.TensorType(type_), shape=value.shape)
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", type_)], outputs=[made], name=f"/{name}/Cast")
        maker = value.producer()
        if maker is not None:
            self._graph.insert_after(maker, cast)
        else:
            self._graph.insert_before(self._graph[0], cast)
        return made

    def _output(self, value: ir.Value) -> ir.Value:
        """An output of the network, which stays float32 and keeps its name."""
        carried = value.producer() in self._carrying
        if value.dtype != self._half and not (carried and value in self._floats):
            return value
        made = self._in_type(value, FLOAT)
        if made is not value:
            name = value.name
            value.name = self._unused(f"{name}.{self._half.name.lower()}")
            made.name = name
        return made

    def _remove_unused(self) -> None:
        for node in reversed(list(self._graph)):
            unused = not any(value.uses() or value in self._graph.outputs for value in node.outputs)
            if node in self._carrying and unused:
                self._graph.remove(node, safe=True)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and value not in self._graph.outputs:
                del self._graph.initializers[name]

    def _unused(self, name: str) -> str:
        found = unused_name(name, self._names)
        self._names.add(found)
        return found
