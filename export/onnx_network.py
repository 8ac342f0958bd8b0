"""The neutral view (qat/network.py) of an ONNX graph, float or with Q/DQ nodes, and where it is quantized.

Q and DQ nodes are no operations of the view: who reads a tensor through them is noted as a quantized read. Operations
are named after the tensor that they make. What is computed from constants alone is constant, as are weights behind
their Q/DQ; what is computed from sizes alone is left out.
"""

from __future__ import annotations


from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from qat.network import ConstantWeight, Network, Op
from qat.operations import Kind, kind_of_onnx

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}  # operator -> which input is the weight
# Inputs that say how an operation works: operator -> attribute name by input position
_ARGUMENTS = {"Pad": {2: "value"}, "ReduceMean": {1: "axes"}}


@dataclass
class OnnxNetwork:
    """What placement sees of an ONNX model, and the ONNX nodes behind it."""

    network: Network
    nodes: dict[str, ir.Node]
    """Operation -> its node."""
    reads: dict[tuple[str, str], list[ir.Node]] = field(default_factory=dict)
    """(reader, tensor) -> the DequantizeLinear nodes through which it is read; only quantized reads."""
    weights: dict[str, ir.Node] = field(default_factory=dict)
    """Operation -> the DequantizeLinear node of its weight."""

    def scale(self, reader: str, tensor: str) -> float | None:
        """The scale by which ``reader`` reads ``tensor``; None where it reads it in float, or the scale is odd."""
        found = self.reads.get((reader, tensor))
        value = constant(found[0].inputs[1]) if found else None
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


def network_from_onnx(model: ir.Model) -> OnnxNetwork:
    """Reads the view. Shapes are those that ``model`` states (export/read.py infers them)."""
    reader = _Reader(model.graph)
    for value in model.graph.inputs:
        reader.add_input(value)
    for node in model.graph:
        reader.add_node(node)
    for value in model.graph.outputs:
        reader.add_output(value)
    return OnnxNetwork(Network(reader.ops), reader.nodes, reader.reads, reader.weights)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer or of a Constant node; None of anything else."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant":
        attribute = next(iter(producer.attributes.values()))
        return attribute.value.numpy() if isinstance(attribute.value, ir.TensorProtocol) else np.asarray(attribute.value)
    return None


@dataclass
class _Reader:
    graph: ir.Graph
    ops: dict[str, Op] = field(default_factory=dict)
    nodes: dict[str, ir.Node] = field(default_factory=dict)
    reads: dict[tuple[str, str], list[ir.Node]] = field(default_factory=dict)
    weights: dict[str, ir.Node] = field(default_factory=dict)
    _constants: set[ir.Value] = field(default_factory=set)
    _sizes: set[ir.Value] = field(default_factory=set)

    def add_input(self, value: ir.Value) -> None:
        if value.name and value.name not in self.graph.initializers:
            self.ops[value.name] = Op(value.name, "input", (), value.name, shape=_shape(value))

    def add_output(self, value: ir.Value) -> None:
        source, through = self._source(value)
        if source is not None and source.name in self.ops:
            name = f"output {value.name}"
            self.ops[name] = Op(name, "output", (source.name,), name)
            if through:
                self.reads[name, source.name] = through

    def add_node(self, node: ir.Node) -> None:
        """Adds the operation of a node, or notes that it is a Q, a DQ, a constant or a size."""
        given = [value for value in node.inputs if value is not None]
        if all(map(self._is_constant, given)):
            self._constants.update(node.outputs)
            return
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            return
        attributes = _attributes(node)
        kind = kind_of_onnx(node.op_type, attributes)
        live = [value for value in given if not self._is_constant(value)]
        if kind == "shape" or all(value in self._sizes for value in live):
            self._sizes.update(node.outputs)
            return
        weight, dequantize = self._weight(node, kind, attributes)
        kind = _exact_kind(node, kind, weight)
        name = node.outputs[0].name or ""
        inputs = []
        for value in node.inputs:
            if value is None or self._is_constant(value) or value in self._sizes:
                continue
            source, through = self._source(value)
            if source is not None and source.name in self.ops:
                inputs.append(source.name)
                if through:
                    self.reads[name, source.name] = through
        if dequantize is not None:
            self.weights[name] = dequantize
        several = kind == "split" and len(node.outputs) > 1
        made = Op(name, kind, tuple(inputs), node.name or name, weight, () if several else _shape(node.outputs[0]))
        if not several:
            self._put(made, node)
            return
        whole = f"{node.name or name} (all parts)"
        for value in inputs:
            if (name, value) in self.reads:
                self.reads[whole, value] = self.reads.pop((name, value))
        self._put(Op(whole, kind, made.inputs, made.label), node)
        for part in node.outputs:
            if part.name:
                self._put(Op(part.name, "data_movement", (whole,), made.label, shape=_shape(part)), node)

    def _put(self, op: Op, node: ir.Node) -> None:
        self.ops[op.name] = op
        self.nodes[op.name] = node

    def _is_constant(self, value: ir.Value) -> bool:
        return value in self._constants or value.const_value is not None or value.name in self.graph.initializers

    def _source(self, value: ir.Value) -> tuple[ir.Value | None, list[ir.Node]]:
        """The tensor behind the Q and DQ nodes that ``value`` comes through, and those DQ nodes, the nearest first."""
        through = []
        current: ir.Value | None = value
        while current is not None and (node := current.producer()) is not None:
            if node.op_type == DEQUANTIZE:
                through.append(node)
            elif node.op_type != QUANTIZE:
                break
            current = node.inputs[0]
        return current, through

    def _weight(
        self, node: ir.Node, kind: Kind, attributes: dict[str, Any]
    ) -> tuple[ConstantWeight | None, ir.Node | None]:
        """The constant weight of a convolution or matrix product, and the DequantizeLinear that it comes through."""
        position = _WEIGHTED.get(node.op_type)
        value = node.inputs[position] if position is not None and len(node.inputs) > position else None
        if value is None or not self._is_constant(value):
            return None, None
        root, dequantize = _weight_root(value)
        shape = tuple(root.shape.numpy()) if root.shape is not None and root.shape.is_static() else ()
        name = root.name or ""
        if node.op_type == "MatMul" and len(shape) != 2:
            return None, None
        if len(shape) < 2:
            return None, dequantize
        groups = int(attributes.get("group", 1))
        if kind == "convolution":
            return ConstantWeight(name, shape[1] * groups, shape[0], groups, shape[2:]), dequantize
        if kind == "transposed_convolution":
            return ConstantWeight(name, shape[0], shape[1] * groups, groups, shape[2:]), dequantize
        transposed = bool(attributes.get("transB", 0)) or _is_transposed(value, root)
        inputs, outputs = shape[::-1] if transposed else shape
        return ConstantWeight(name, inputs, outputs), dequantize


def _weight_root(value: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """The initializer that a constant comes from, and the last DequantizeLinear on the way."""
    dequantize = None
    while (node := value.producer()) is not None and node.op_type != "Constant" and node.inputs[0] is not None:
        if node.op_type == DEQUANTIZE and dequantize is None:
            dequantize = node
        value = node.inputs[0]
    return value, dequantize


def _is_transposed(value: ir.Value, root: ir.Value) -> bool:
    turned = False
    while value is not root and (node := value.producer()) is not None and node.inputs[0] is not None:
        turned ^= node.op_type == "Transpose"
        value = node.inputs[0]
    return turned


def _exact_kind(node: ir.Node, kind: Kind, weight: ConstantWeight | None) -> Kind:
    if node.op_type == "MatMul" and weight is not None:
        return "linear"
    if node.op_type == "Gemm" and weight is None:
        return "matrix_product"
    return kind


def _attributes(node: ir.Node) -> dict[str, Any]:
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "Cast" and (value := node.inputs[0]) is not None and value.dtype is not None:
        found["from"] = int(value.dtype)
    for position, name in _ARGUMENTS.get(node.op_type, {}).items():
        value = constant(node.inputs[position]) if len(node.inputs) > position else None
        if value is not None:
            found[name] = value.tolist()
    return found


def _shape(value: ir.Value) -> tuple[int, ...]:
    """The shape with 1 for an unknown batch; () where more is unknown."""
    if value.shape is None or not value.shape.rank():
        return ()
    batch, *rest = value.shape.dims
    if not all(isinstance(extent, int) for extent in rest):
        return ()
    return (batch if isinstance(batch, int) else 1, *(int(extent) for extent in rest))


