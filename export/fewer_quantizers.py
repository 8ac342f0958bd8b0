"""A Q/DQ file placed again: layers that are to be float lose their quantizers, the others keep scales and codes.

Nothing is calibrated and nothing trained: what stays quantized has the same scale and the same codes. Needs no torch,
so that engines can be tuned where only TensorRT is.
"""

from __future__ import annotations

import glob
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from export.float_types import store_floats_as
from export.insert import WeightCodes, insert
from export.names import SPLIT
from export.onnx_network import DEQUANTIZE, QUANTIZE, WEIGHT, constants, network_from_onnx, permutation
from export.pad_groups import Widths, set_group_widths, without_padding
from export.qdq import DATA, HALF_TYPES, SCALE, QdqModel, size_of
from export.read import read_onnx
from qat.base import own_json
from qat.base.errors import UserError
from qat.base.number_format import INT8
from qat.graph.data_movement import Read, copies_of
from qat.graph.network import Network
from qat.graph.operations import COMMUTING
from qat.rules.place import place
from qat.rules.placement import Placement, QuantizedRead

_AS_IN_THE_FILE = "as_in_the_file"


@dataclass(frozen=True, eq=False)
class FloatTwin:
    """The float network behind a Q/DQ file, with the values that its codes stand for, and what quantized it.

    Attributes:
        model: without Q/DQ nodes, but for those behind an input of codes.
        scales: of the tensors that were quantized, by name.
        reads: which operations read which tensors quantized.
        weights: by the name of the float weight.
        padded: widths of groups that the file has padded with zeros; ``model`` is without them.
    """

    model: ir.Model
    scales: dict[str, float]
    reads: frozenset[Read]
    weights: dict[str, WeightCodes]
    padded: dict[str, Widths]

    @classmethod
    def of(cls, path: Path) -> FloatTwin:
        """Raises UserError when the file cannot be read, stores floats in half precision, or does not quantize so.

        A tensor has one constant scale, and the codes of a weight are constant.
        """
        model = read_onnx(path)
        if any(value.dtype in HALF_TYPES for node in model.graph for value in node.outputs):
            raise UserError(f"{path} stores floats in half precision: give the file without --float-type")
        padded = without_padding(model)
        reads = frozenset(network_from_onnx(model).reads)
        qdq, known = QdqModel.from_ir(model, INT8), constants(model.graph)
        scales: dict[str, float] = {}
        weights: dict[str, WeightCodes] = {}
        for node in list(model.graph):
            if node.op_type != DEQUANTIZE:
                continue
            codes, output = node.inputs[DATA], node.outputs[0]
            maker = None if codes is None else codes.producer()
            scale = qdq.value(node.inputs[SCALE])
            if scale is None:
                raise UserError(f"{path}: the scale of {node.name} is not constant")
            if codes in known:
                values = qdq.value(codes)
                if values is None:
                    raise UserError(f"{path}: the codes of {node.name} cannot be computed")
                weights |= _to_float_weights(model.graph, node, values, scale.astype(np.float32))
            elif maker is not None and maker.op_type == QUANTIZE:
                given = maker.inputs[DATA]
                assert given is not None
                one = float(scale.reshape(-1)[0])
                if size_of(scale) != 1 or scales.setdefault(given.name or "", one) != one:
                    raise UserError(f"{path}: {given.name} is not quantized by one scale")
                output.replace_all_uses_with(given, replace_graph_outputs=True)
        if not scales:
            raise UserError(f"{path} quantizes no activation: give a Q/DQ file")
        passes.RemoveUnusedNodesPass()(model)
        return cls(model, scales, reads, weights, padded)

    def quantized(self, keep_float: Collection[str]) -> Placement:
        """Quantizes ``model`` again, in place, by the rules; what ``keep_float`` names stays in float.

        Which layers have INT8 kernels the file has decided. Groups that it has padded are padded again.

        Raises UserError when a pattern matches nothing.
        """
        view = network_from_onnx(self.model)
        coded = {op.name for op in view.network if op.weight and self._has_codes(view.nodes[op.name])}
        own = [glob.escape(op.name) for op in view.network if op.weight and op.name not in coded]
        scales_of = {
            tensor: scale for tensor in view.network.ops if (scale := self._scale(view.network, tensor)) is not None
        }
        unknown: set[str] = set()
        while True:  # without a tensor the placement is another one, which may want other tensors
            placement = place(view.network, [*keep_float, *own], unknown, quantizable=coded)
            missing = {tensor.tensor for tensor in placement.tensors} - scales_of.keys() - unknown
            if not missing:
                break
            unknown |= missing
        scales: dict[str, float] = {}
        for tensor in placement.tensors:  # those that share a quantizer may have had several
            scales[tensor.quantizer] = max(scales.get(tensor.quantizer, 0.0), scales_of[tensor.tensor])
        placement = self._with_other_reads(placement)
        insert(self.model, view, placement, scales, INT8, lambda weight, _: self.weights[weight.name or ""])
        quantized = {decision.op for decision in placement.weights if decision.quantized}
        set_group_widths(self.model, {name: widths for name, widths in self.padded.items() if name in quantized})
        return placement

    def _with_other_reads(self, placement: Placement) -> Placement:
        """With the quantized reads of operations about which no rule decides, such as a layer normalization."""
        decided = {decision.op for decision in placement.decisions}
        tensors = []
        for tensor in placement.tensors:
            others = sorted(reader for reader, read in self.reads if read == tensor.tensor and reader not in decided)
            known = {read.reader for read in tensor.reads}
            more = tuple(QuantizedRead(reader, _AS_IN_THE_FILE) for reader in others if reader not in known)
            tensors.append(replace(tensor, reads=(*tensor.reads, *more)))
        return replace(placement, tensors=tuple(tensors))

    def _scale(self, network: Network, tensor: str) -> float | None:
        """The scale of a tensor, or of what is the same but for data movement; None if none of them was quantized."""
        source = network[tensor]
        while source.kind in COMMUTING and source.inputs:
            source = network[source.inputs[0]]
        same = (tensor, source.name, *copies_of(network, source.name))
        return next((self.scales[name] for name in same if name in self.scales), None)

    def _has_codes(self, node: ir.Node) -> bool:
        weight = node.inputs[WEIGHT]
        return weight is not None and weight.name in self.weights


def float_network(path: Path) -> Network:
    """The neutral view of the float network behind a Q/DQ file. Raises UserError as ``FloatTwin.of`` does."""
    return network_from_onnx(FloatTwin.of(path).model).network


def split_layers(path: Path) -> tuple[str, ...]:
    """The layers that an export made several (export/split_projections.py), by their names in the model."""
    try:
        return own_json.typed(own_json.parse(read_onnx(path).metadata_props.get(SPLIT, "[]")), tuple[str, ...])
    except own_json.JsonError:
        return ()


def write_variant(path: Path, keep_float: Collection[str], output: Path) -> bool:
    """Writes the Q/DQ file ``path`` with the operations called ``keep_float`` (labels) in float.

    Returns whether anything is left in INT8.

    Raises UserError as ``FloatTwin.of`` does, and when there is no such operation.
    """
    twin = FloatTwin.of(path)
    placement = twin.quantized([glob.escape(label) for label in sorted(keep_float)])
    ir.save(twin.model, output)
    return bool(placement.tensors)


def write_float_twin(path: Path, output: Path, *, half: bool) -> None:
    """Writes the float network behind a Q/DQ file; with ``half`` it computes in float16 where that is safe."""
    model = FloatTwin.of(path).model
    if half:
        store_floats_as(model, "float16", [])
    ir.save(model, output)


def _to_float_weights(graph: ir.Graph, node: ir.Node, codes: np.ndarray, scale: np.ndarray) -> dict[str, WeightCodes]:
    """Replaces a weight's DequantizeLinear, and transpositions of it, by float constants; their codes by name."""
    output, axis = node.outputs[0], node.attributes.get_int("axis", 1) % max(codes.ndim, 1)
    along = scale.reshape([-1 if index == axis else 1 for index in range(codes.ndim)]) if scale.ndim else scale
    floats = (codes * along).astype(np.float32)
    found = {}
    for reader in [usage.node for usage in output.uses()]:
        if reader.op_type == "Transpose":
            axes = permutation(reader, codes.ndim)
            name = _replace(graph, reader.outputs[0], floats.transpose(axes))
            found[name] = WeightCodes(codes.transpose(axes), scale, axes.index(axis) if scale.ndim else None)
    found[_replace(graph, output, floats)] = WeightCodes(codes, scale, axis if scale.ndim else None)
    return found


def _replace(graph: ir.Graph, value: ir.Value, array: np.ndarray) -> str:
    """Lets all readers of ``value`` read a new constant; its name."""
    name = f"{value.name}.float"
    tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
    constant = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(constant)
    value.replace_all_uses_with(constant)
    return name
