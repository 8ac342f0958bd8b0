"""The neutral view (qat/graph/network.py) of an ONNX graph, float or with Q/DQ nodes, and where it is quantized.

Q and DQ nodes are not operations of the view: it notes a read through them as a quantized read. Operations are named
after the tensor that they make; a GELU of several operators is one operation. What is computed from constants only is
constant, and so are weights behind their Q/DQ. What is computed from sizes only is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from export.composed_activations import ComposedActivation, composed_activations
from export.names import unused_name
from qat.base.number_format import EXPORTED
from qat.graph.network import ConstantWeight, Network, Op, exact_kind
from qat.graph.operations import OpKind, kind_of_onnx

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
WEIGHT = 1
"""Which input of a ``WEIGHTED`` operator is its weight."""
MOVING = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast")
"""Operators that leave the values of a weight as they are."""
CODE_TYPES = tuple(ir.DataType[number_format.onnx_type] for number_format in EXPORTED)
"""The types of tensors that hold codes."""
# Inputs that say how an operation works: operator -> attribute name by input position
_ARGUMENTS = {"Pad": {2: "value"}, "ReduceMean": {1: "axes"}}


@dataclass
class OnnxNetwork:
    """What placement sees of an ONNX model, and the ONNX nodes behind it."""

    network: Network
    nodes: dict[str, ir.Node]
    """Operation -> its node, or the last of those that it is composed of."""
    reads: dict[tuple[str, str], list[ir.Node]] = field(default_factory=dict)
    """(reader, tensor) -> the DequantizeLinear nodes through which it is read. Reads in float are left out."""
    weights: dict[str, ir.Node] = field(default_factory=dict)
    """Operation -> the DequantizeLinear node of its weight."""
    composed: dict[str, frozenset[ir.Node]] = field(default_factory=dict)
    """Operation -> all nodes that it is composed of, if they are several."""

    def all_nodes(self, op: str) -> frozenset[ir.Node]:
        """The nodes of an operation."""
        return self.composed.get(op, frozenset((self.nodes[op],)))

    def scale(self, reader: str, tensor: str) -> float | None:
        """The scale by which ``reader`` reads ``tensor``; None if it reads in float, or by no single constant scale."""
        found = self.reads.get((reader, tensor))
        value = constant(found[0].inputs[1]) if found else None
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


def network_from_onnx(model: ir.Model) -> OnnxNetwork:
    """Reads the view. Shapes are those that ``model`` states (export/read.py infers them)."""
    reader = _Reader(constants(model.graph))
    for value in model.graph.inputs:
        reader.add_input(value)
    composed = {node: one for one in composed_activations(model.graph, reader.constants) for node in one.nodes}
    for node in model.graph:
        if node not in composed:
            reader.add_node(node)
        elif node is composed[node].last:
            reader.add_activation(composed[node])
    for value in model.graph.outputs:
        reader.add_output(value)
    return OnnxNetwork(Network(reader.ops), reader.nodes, reader.reads, reader.weights, reader.composed)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer or of a Constant node; None of anything else."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant":
        (attribute,) = producer.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR:
            return attribute.as_tensor().numpy()
        if attribute.type != ir.AttributeType.SPARSE_TENSOR:
            return np.asarray(attribute.value, np.float32 if "float" in attribute.name else None)
    return None


def constants(graph: ir.Graph) -> set[ir.Value]:
    """All values of ``graph`` that are computed from initializers and Constant nodes only."""
    found = {value for inner in (graph, *graph.subgraphs()) for value in inner.initializers.values()}
    for node in graph.all_nodes():
        if all(value in found for value in _inputs_of(node)):
            found.update(node.outputs)
    return found


def _inputs_of(node: ir.Node) -> Iterator[ir.Value]:
    """The inputs of a node, and what its subgraphs read from outside."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inner = list(attribute.as_graph().all_nodes())
            inside = {value for made in inner for value in made.outputs}
            for value in (value for reader in inner for value in reader.inputs if value is not None):
                if value not in inside and value.graph is node.graph:
                    yield value


@dataclass
class _Reader:
    constants: set[ir.Value]
    ops: dict[str, Op] = field(default_factory=dict)
    nodes: dict[str, ir.Node] = field(default_factory=dict)
    reads: dict[tuple[str, str], list[ir.Node]] = field(default_factory=dict)
    weights: dict[str, ir.Node] = field(default_factory=dict)
    composed: dict[str, frozenset[ir.Node]] = field(default_factory=dict)
    _sizes: set[ir.Value] = field(default_factory=set)

    def add_input(self, value: ir.Value) -> None:
        if value.name and value not in self.constants:
            self.ops[value.name] = Op(value.name, "input", (), value.name, None, _shape(value), _floating(value))

    def add_output(self, value: ir.Value) -> None:
        name = unused_name(f"output {value.name}", self.ops)
        if inputs := self._read(name, [value]):
            self.ops[name] = Op(name, "output", inputs, name)

    def add_node(self, node: ir.Node) -> None:
        """Adds the operation of a node, unless it is a Q, a DQ, a constant or a size."""
        live = [value for value in _inputs_of(node) if value not in self.constants]
        if not live or node.op_type in (QUANTIZE, DEQUANTIZE):
            return
        kind = kind_of_onnx(node.op_type, _attributes(node))
        if kind == "shape" or all(value in self._sizes for value in live):
            self._sizes.update(node.outputs)
            return
        if self._joins_bias(node, live):
            return
        if (rolled := _rolled(node)) is not None:
            kind, live = "data_movement", [rolled]
            for part in node.inputs:
                if part is not None and len(part.uses()) == 1:
                    self.ops.pop(part.name or "", None)
        weight, dequantize = self._weight(node, kind)
        kind = exact_kind(kind, weight, len(live), rolled is None and node.inputs[0] not in live)
        if node.op_type == "Gemm" and weight is None:
            kind = "matrix_product"
        outputs = [value for value in node.outputs if value.name]
        name = outputs[0].name or ""
        if kind == "split" and len(outputs) > 1:
            self._add_split(node, live, outputs)
            return
        if dequantize is not None:
            self.weights[name] = dequantize
        made = outputs[0]
        label = node.name or name
        self._put(Op(name, kind, self._read(name, live), label, weight, _shape(made), _floating(made)), node)
        for value in outputs[1:]:
            other = value.name or ""
            self._put(Op(other, "other", self._read(other, live), node.name or other, shape=_shape(value)), node)

    def _joins_bias(self, node: ir.Node, live: list[ir.Value]) -> bool:
        """Makes a MatMul and the Add of its bias one linear layer, named after the Add's output; False if none is."""
        made, (product, *others) = node.outputs[0].name or "", live
        layer = self.ops.get(product.name or "")
        biases = [value for value in node.inputs if value is not None and value in self.constants]
        if node.op_type != "Add" or others or len(biases) != 1 or layer is None or len(product.uses()) != 1:
            return False
        weight, matrix = layer.weight, self.nodes.get(layer.name)
        if weight is None or matrix is None or matrix.op_type != "MatMul":
            return False
        if _weight_shape(biases[0]) != (weight.out_channels,):
            return False
        del self.ops[layer.name]
        self._put(replace(layer, name=made), self.nodes.pop(layer.name))
        for reader, tensor in [read for read in self.reads if read[0] == layer.name]:
            self.reads[made, tensor] = self.reads.pop((reader, tensor))
        if layer.name in self.weights:
            self.weights[made] = self.weights.pop(layer.name)
        return True

    def add_activation(self, composed: ComposedActivation) -> None:
        """Adds several nodes as one operation."""
        node = composed.last
        made = node.outputs[0]
        name = made.name or ""
        inputs = self._read(name, [composed.given])
        self._put(Op(name, composed.kind, inputs, node.name or name, None, _shape(made), _floating(made)), node)
        self.composed[name] = composed.nodes

    def _add_split(self, node: ir.Node, live: list[ir.Value], outputs: list[ir.Value]) -> None:
        label = node.name or outputs[0].name or ""
        whole = unused_name(f"{label} (all parts)", self.ops)
        self._put(Op(whole, "split", self._read(whole, live), label, floating=False), node)
        for part in outputs:
            self._put(Op(part.name or "", "data_movement", (whole,), label, shape=_shape(part)), node)

    def _put(self, op: Op, node: ir.Node) -> None:
        self.ops[op.name] = op
        self.nodes[op.name] = node

    def _read(self, reader: str, values: list[ir.Value]) -> tuple[str, ...]:
        """The operations whose tensors ``reader`` reads as ``values``. Notes which of them it reads quantized."""
        inputs = []
        for value in values:
            source, through = _source(value)
            if source.name in self.ops:
                inputs.append(source.name)
                if through:
                    self.reads[reader, source.name] = through
        return tuple(inputs)

    def _weight(self, node: ir.Node, kind: OpKind) -> tuple[ConstantWeight | None, ir.Node | None]:
        """The constant weight of a convolution or matrix product, and the DequantizeLinear that it comes from."""
        value = node.inputs[WEIGHT] if node.op_type in WEIGHTED else None
        if value is None or value not in self.constants:
            return None, None
        shape, name, dequantize = _weight_shape(value), _root(value).name or "", _dequantizer_of(value)
        if len(shape) < 2 or (node.op_type in ("MatMul", "Gemm") and len(shape) != 2):
            return None, dequantize
        groups = node.attributes.get_int("group", 1)
        if kind in ("convolution", "transposed_convolution"):
            inputs, outputs = shape[1] * groups, shape[0]
            if kind == "transposed_convolution":
                inputs, outputs = shape[0], inputs
            stride = tuple(node.attributes.get_ints("strides", (1,) * len(shape[2:])))
            return ConstantWeight(name, inputs, outputs, groups, shape[2:], stride), dequantize
        inputs, outputs = shape[::-1] if node.attributes.get_int("transB", 0) else shape
        return ConstantWeight(name, inputs, outputs), dequantize


def _rolled(node: ir.Node) -> ir.Value | None:
    """The tensor of which ``node`` joins two slices, as torch.roll is exported; None for another node."""
    producers = [value.producer() if value is not None else None for value in node.inputs]
    if node.op_type != "Concat" or len(producers) != 2:
        return None
    given = {made.inputs[0] if made is not None and made.op_type == "Slice" else None for made in producers}
    return given.pop() if len(given) == 1 else None


def _source(value: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """The tensor before the Q and DQ nodes that ``value`` comes through, and those DQ nodes, the nearest first."""
    through = []
    while (node := value.producer()) is not None and node.op_type in (QUANTIZE, DEQUANTIZE):
        if node.op_type == DEQUANTIZE:
            through.append(node)
        (value, *_) = _inputs_of(node)
    return value, through


def _root(value: ir.Value) -> ir.Value:
    """The initializer, or Constant node's output, that a constant is made from."""
    while (node := value.producer()) is not None and (given := next(_inputs_of(node), None)) is not None:
        value = given
    return value


def _dequantizer_of(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that a weight comes from, if only operators of ``MOVING`` stand between."""
    while (node := value.producer()) is not None and node.op_type in MOVING:
        (value, *_) = _inputs_of(node)
    return node if node is not None and node.op_type == DEQUANTIZE else None


def _weight_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a constant; () if it is not known."""
    if value.shape is not None and value.shape.is_static():
        return tuple(value.shape.numpy())
    node = value.producer()
    if node is None or node.op_type == "Constant":
        array = constant(value)
        return () if array is None else array.shape
    (given, *_) = _inputs_of(node)
    if node.op_type in (QUANTIZE, DEQUANTIZE, "Identity", "Cast"):
        return _weight_shape(given)
    if node.op_type == "Transpose":
        shape = _weight_shape(given)
        return tuple(shape[axis] for axis in permutation(node, len(shape)))
    return ()


def permutation(transpose: ir.Node, rank: int) -> list[int]:
    """Which axis of its input each axis of a Transpose's output is."""
    return list(transpose.attributes.get_ints("perm", tuple(reversed(range(rank)))))


def _attributes(node: ir.Node) -> dict[str, Any]:
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "Cast" and (value := node.inputs[0]) is not None and value.dtype is not None:
        found["from"] = int(value.dtype)
    for position, name in _ARGUMENTS.get(node.op_type, {}).items():
        array = constant(node.inputs[position]) if len(node.inputs) > position else None
        if array is not None:
            found[name] = array.tolist()
    rank = None if node.inputs[0] is None or node.inputs[0].shape is None else node.inputs[0].shape.rank()
    if rank and isinstance(found.get("axes"), (list, tuple)):
        found |= {"rank": rank, "axes": [axis % rank for axis in found["axes"]]}
    return found


def _shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape, with 1 for an unknown batch; None if more than the batch is unknown."""
    if value.shape is None or not value.shape.rank():
        return None
    batch, *rest = value.shape.dims
    known = [extent for extent in rest if isinstance(extent, int)]
    return (batch if isinstance(batch, int) else 1, *known) if len(known) == len(rest) else None


def _floating(value: ir.Value) -> bool:
    """Whether a tensor holds floating-point numbers, or codes, which stand for them; True if its type is not known."""
    return value.dtype is None or value.dtype.is_floating_point() or value.dtype in CODE_TYPES
