"""INT8 weights -> float weights in front of a QuantizeLinear: the same codes, for tools that refuse INT8 constants.

TensorRT 8.6.0 refuses them where it merges convolutions of one input into one (inception blocks), and where it hands a
part of the network to another compiler (a cast of uint8 input). Both were seen on an H200. deploy uses this module too,
so it does not need torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, helper, numpy_helper

from export.names import unused_name
from qat.base.choices import WeightStorage
from qat.base.errors import UserError
from qat.base.number_format import EXPORTED
from qat.base.onnx_structure import check_structure
from qat.base.text import megabytes


def with_float_weights(path: Path) -> bytes:
    """The content of an ONNX file after ``make_weights_float``."""
    check_structure(path)
    model = onnx.load(path)
    make_weights_float(model)
    return bytes(model.SerializeToString())


_LARGEST_FILE = 2**31
"""Bytes of a file that protobuf can write."""


def save_onnx(model: onnx.ModelProto, path: Path, weights: WeightStorage) -> None:
    """Writes ``model``, whose weights are codes, as it is or, where ``weights`` is float, with float weights.

    Raises UserError when the file would be larger than an ONNX file can be, 2 GB.
    """
    if weights == "float":
        make_weights_float(model)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size >= _LARGEST_FILE:
        raise UserError(
            f"the file would hold {megabytes(size)} of weights, and an ONNX file holds less than 2 GB: export INT8 or "
            "float16"
        )
    onnx.save(model, path)


def make_weights_float(model: onnx.ModelProto) -> None:
    """Replaces, in place, every initializer of codes that a DequantizeLinear of the main graph reads.

    The codes stay the same: code * scale and then / scale are each off by at most a relative 2^-11 in float16 (2^-24 in
    float32). For INT8 that is 127 * 2^-10 at most, far from the half that would round to another code.
    """
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    taken = set(_names(graph))
    quantizers: dict[tuple[str, ...], NodeProto] = {}
    for node in graph.node:
        if _dequantizes_a_weight(node, constants):
            key = tuple(node.input)
            if key not in quantizers:  # a weight may serve several layers
                quantizers[key] = _add_quantizer(graph, node, constants, taken)
            node.input[0] = quantizers[key].output[0]
    nodes = [*quantizers.values(), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    replaced = {key[0] for key in quantizers} - set(_names_read(graph))
    for entries in (graph.initializer, graph.input):  # old files list initializers as inputs too
        kept = [entry for entry in entries if entry.name not in replaced]
        del entries[:]
        entries.extend(kept)


def _dequantizes_a_weight(node: NodeProto, constants: dict[str, np.ndarray]) -> bool:
    """Whether ``node`` makes a weight of codes, with zero point 0 and one scale, or one scale for each channel."""
    if node.op_type != "DequantizeLinear" or not {*node.input[:2]} <= constants.keys():
        return False
    codes, scale = (constants[name] for name in node.input[:2])
    zero_points = [constants.get(name) for name in node.input[2:] if name]
    symmetric = all(one is not None and not one.any() for one in zero_points)
    has_codes = codes.dtype.name in [number_format.dtype for number_format in EXPORTED]
    return symmetric and has_codes and scale.ndim < 2 and scale.dtype in (np.float32, np.float16)


def _add_quantizer(
    graph: GraphProto, dequantizer: NodeProto, constants: dict[str, np.ndarray], taken: set[str]
) -> NodeProto:
    """Adds the float weight to ``graph``; returns the node that makes the codes of it that ``dequantizer`` reads."""
    name = dequantizer.input[0]
    codes, scale = (constants[one] for one in dequantizer.input[:2])
    (axis,) = [attribute.i for attribute in dequantizer.attribute if attribute.name == "axis"] or [1]
    channels = [-1 if index == axis % codes.ndim else 1 for index in range(codes.ndim)] if scale.ndim else []

    def new(wanted: str) -> str:
        found = unused_name(wanted, taken)
        taken.add(found)
        return found

    def constant(wanted: str, values: np.ndarray) -> str:
        unique = new(wanted)
        graph.initializer.append(numpy_helper.from_array(values, unique))
        return unique

    weight = constant(f"{name}.float", codes.astype(scale.dtype) * scale.reshape(channels))
    zero_point = (*dequantizer.input[2:], "")[0] or constant(f"{name}.zero_point", np.zeros(scale.shape, codes.dtype))
    made = new(f"{dequantizer.name.removesuffix('/dequantize') or name}/quantize")
    return helper.make_node("QuantizeLinear", [weight, dequantizer.input[1], zero_point], [made], made, axis=axis)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """``graph`` and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inside in (*attribute.graphs, *([attribute.g] if attribute.type == AttributeProto.GRAPH else [])):
                yield from _graphs(inside)


def _names(graph: GraphProto) -> Iterator[str]:
    """The names of all nodes and tensors."""
    for one in _graphs(graph):
        yield from (entry.name for entries in (one.initializer, one.input, one.node) for entry in entries)
        yield from (name for node in one.node for name in node.output)


def _names_read(graph: GraphProto) -> Iterator[str]:
    """The names of all tensors that a node or an output reads."""
    for one in _graphs(graph):
        yield from (output.name for output in one.output)
        yield from (name for node in one.node for name in node.input)
