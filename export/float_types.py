"""float32 ONNX -> a file whose layers that are not INT8 compute in float16 or bfloat16, where that is safe.

A strongly typed network takes every type from the file, so that a layer which the file leaves in float32 runs in FP32.
Types follow from the nodes: each is half or float32, and what the ONNX schema of its operator lets an input be decides
which inputs are half. Where a tensor is made in one type and read in another, a Cast stands between. It never stands
behind a DequantizeLinear: that is written once for each type, because its scale says what it makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export.names import unused_name
from export.session import run, session_with_tensors
from qat.base.console import say

HalfType = Literal["float16", "bfloat16"]
_TYPES: Mapping[HalfType, ir.DataType] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_REFUSED_BY_TENSORRT: Mapping[HalfType, tuple[str, ...]] = {"float16": (), "bfloat16": ("HardSwish",)}
_OPSETS: Mapping[HalfType, int] = {"float16": 20, "bfloat16": 22}
_FLOAT = ir.DataType.FLOAT
# Sums of many squares or exponentials, which exceed float16 or lose its 11 bits.
_WIDE_OPERATORS = (
    *("LayerNormalization", "GroupNormalization", "InstanceNormalization", "LpNormalization", "Softmax", "LogSoftmax"),
    *("Exp", "Log", "Pow", "CumSum", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd"),
    *("ReduceSum", "ReduceSumSquare"),
)
_IMAGES_MEASURED, _BATCHES_MEASURED = 8, 4
_ROOM = 4
"""A type must hold so many times the largest magnitude that was measured."""


@dataclass(frozen=True)
class KeptFloat32:
    """A node that stays in float32, and why."""

    node: str
    reason: str


class HalfFloats:
    """Rewrites a model whose floats are all float32, in place.

    Args:
        model: an ONNX model.
        kind: the type that takes the place of float32.
        largest: the largest magnitude of tensors by name, as measured; those that are not named are taken to be small.
    """

    def __init__(self, model: ir.Model, kind: HalfType, largest: Mapping[str, float]) -> None:
        self._graph, self._kind, self._half, self._largest = model.graph, kind, _TYPES[kind], largest
        limits = ml_dtypes.finfo(self._half.numpy())  # type: ignore[no-untyped-call]
        self._highest, self._lowest = float(limits.max) / _ROOM, float(limits.tiny)
        # Operators are the same since 20, but some of them, Conv too, take bfloat16 only from 22 on.
        self._opset = model.opset_imports[""] = max(model.opset_imports[""], _OPSETS[kind])
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._floats = {v for node in model.graph for v in (*node.inputs, *node.outputs) if v and v.dtype == _FLOAT}
        self._names = {value.name or "" for node in model.graph for value in (*node.inputs, *node.outputs) if value}

    def rewrite(self) -> list[KeptFloat32]:
        """Does it. Returns the nodes that stay in float32, in the order of the network."""
        nodes = list(self._graph)
        kept = {node: reason for node in nodes if (reason := self._why_wide(node))}
        for node in nodes:
            if node.op_type == "DequantizeLinear":
                continue  # made in the types of its readers
            self._retype(node, ir.DataType.FLOAT if node in kept else self._half)
        for index, output in enumerate(self._graph.outputs):
            self._graph.outputs[index] = self._output(output)
        self._remove_unused()
        named = [node for node in nodes if node in kept and self._floats & set(node.outputs)]
        return [KeptFloat32(node.name or node.op_type, kept[node]) for node in named]

    def _why_wide(self, node: ir.Node) -> str:
        """Why a node computes in float32; '' for one that computes in half precision."""
        if node.domain not in ("", "ai.onnx") or any(
            a.type == ir.AttributeType.GRAPH for a in node.attributes.values()
        ):
            return f"{node.op_type} is not known to compute in half precision"
        if node.op_type in _REFUSED_BY_TENSORRT[self._kind]:
            return f"TensorRT has no {node.op_type} in {self._kind}"
        if node.op_type in _WIDE_OPERATORS:
            return f"{node.op_type} needs the range of float32"
        from_integers = node.op_type == "Cast" and node.inputs[0] not in self._floats
        if from_integers or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return ""
        floats = [value for value in (*node.inputs, *node.outputs) if value in self._floats]
        if floats and not any(self._may_be_half(node, index) for index in range(len(node.inputs))):
            return f"{node.op_type} takes float32 only" if self._floats & set(node.inputs) else "made in float32"
        for value in floats:
            if (largest := self._magnitude(value)) > self._highest:
                return f"{value.name} reaches {largest:.3g}"
        makers = [value.producer() for value in node.inputs if value is not None]
        readers = [usage.node for value in node.outputs for usage in value.uses()]
        quantizing = [one for one in makers if one is not None and one.op_type == "DequantizeLinear"]
        quantizing += [one for one in readers if one.op_type == "QuantizeLinear"]
        if small := [one for one in quantizing if _least(one.inputs[1]) < self._lowest]:
            return f"the scale of {small[0].name} is below {self._lowest:.1e}"
        return ""

    def _magnitude(self, value: ir.Value) -> float:
        if value.const_value is None:
            return self._largest.get(value.name or "", 0.0)
        array = value.const_value.numpy()
        finite = array[np.isfinite(array)]  # an infinity stays one
        return float(np.abs(finite).max(initial=0))

    def _may_be_half(self, node: ir.Node, index: int) -> bool:
        """Whether the operator's schema lets an input be of half precision."""
        given = node.inputs[index]
        if given not in self._floats:
            return False
        schema = onnx.defs.get_schema(node.op_type, self._opset)
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
        return f"tensor({self._half.name.lower()})" in allowed.get(formal.type_str, ())

    def _retype(self, node: ir.Node, type_: ir.DataType) -> None:
        """Makes the float inputs of ``node`` of ``type_`` as far as its schema allows, and its outputs what follows."""
        if node.op_type == "QuantizeLinear":
            self._retype_quantizer(node)
            return
        for index, value in enumerate(node.inputs):
            if value is not None and value in self._floats:
                wanted = type_ if type_ == _FLOAT or self._may_be_half(node, index) else _FLOAT
                node.replace_input_with(index, self._in_type(value, wanted))
        if type_ == _FLOAT:
            return
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", type_)
        schema = onnx.defs.get_schema(node.op_type, self._opset)
        for index, value in enumerate(node.outputs):
            formal = schema.outputs[min(index, len(schema.outputs) - 1)]
            if value in self._floats and "(" not in formal.type_str:
                value.dtype = type_

    def _retype_quantizer(self, node: ir.Node) -> None:
        """A quantizer reads its tensor as it is; a 16-bit scale must have the tensor's type."""
        x, scale = node.inputs[0], node.inputs[1]
        assert x is not None
        assert scale is not None
        if x.const_value is None and (maker := x.producer()) is not None and maker.op_type == "DequantizeLinear":
            x = self._in_type(x, self._half)
            node.replace_input_with(0, x)
        wanted = x.dtype if x.dtype == self._half else _FLOAT
        node.replace_input_with(1, self._scale(scale, wanted))

    def _in_type(self, value: ir.Value, type_: ir.DataType) -> ir.Value:
        """``value`` in ``type_``: itself, a converted constant, another DequantizeLinear, or a Cast of it."""
        maker = value.producer()
        if value.dtype == type_ and (maker is None or maker.op_type != "DequantizeLinear"):
            return value
        key = (value, type_)
        if key not in self._made:
            if value.const_value is not None:
                self._made[key] = self._constant(value, type_)
            elif maker is not None and maker.op_type == "DequantizeLinear":
                self._made[key] = self._dequantized(maker, type_)
            else:
                self._made[key] = self._cast(value, type_)
        return self._made[key]

    def _scale(self, scale: ir.Value, type_: ir.DataType) -> ir.Value:
        """A scale in ``type_``; in float32 it has the value that half precision gives it, as both sides must agree."""
        key = (scale, type_)
        if key not in self._made:
            assert scale.const_value is not None
            array = scale.const_value.numpy()
            small = bool((array < self._lowest).any())  # then its readers compute in float32
            rounded = array if small else array.astype(self._half.numpy())
            self._made[key] = self._constant(scale, type_, rounded, renamed=type_ != _FLOAT)
        return self._made[key]

    def _constant(
        self, value: ir.Value, type_: ir.DataType, array: np.ndarray | None = None, *, renamed: bool = True
    ) -> ir.Value:
        assert value.const_value is not None
        values = (value.const_value.numpy() if array is None else array).astype(type_.numpy())
        name = self._unused(f"{value.name}.{type_.name.lower()}") if renamed else str(value.name)
        tensor = ir.Tensor(values, dtype=type_, name=name)
        if not renamed:
            value.const_value = tensor
            return value
        made = ir.Value(name=name, type=ir.TensorType(type_), shape=tensor.shape, const_value=tensor)
        self._graph.register_initializer(made)
        return made

    def _dequantized(self, node: ir.Node, type_: ir.DataType) -> ir.Value:
        """The output of a DequantizeLinear that makes ``type_``."""
        (output,) = node.outputs
        others = [made for (value, _), made in self._made.items() if value is output]
        codes, scale, *zero = node.inputs
        assert scale is not None
        if not others:  # the node itself
            node.replace_input_with(1, self._scale(scale, type_))
            output.dtype = type_
            return output
        name = self._unused(f"{output.name}.{type_.name.lower()}")
        twin = ir.Node(
            "",
            "DequantizeLinear",
            [codes, self._scale(self._original_scale(scale), type_), *zero],
            list(node.attributes.values()),
            outputs=[ir.Value(name=name, type=ir.TensorType(type_), shape=output.shape)],
            name=self._unused(f"{node.name}.{type_.name.lower()}"),
        )
        self._graph.insert_after(node, twin)
        return twin.outputs[0]

    def _original_scale(self, scale: ir.Value) -> ir.Value:
        """The scale that ``scale`` was made of, or itself."""
        return next((value for (value, _), made in self._made.items() if made is scale), scale)

    def _cast(self, value: ir.Value, type_: ir.DataType) -> ir.Value:
        name = self._unused(f"{value.name}.{type_.name.lower()}")
        cast = ir.Node(
            "",
            "Cast",
            [value],
            [ir.AttrInt64("to", type_)],
            outputs=[ir.Value(name=name, type=ir.TensorType(type_), shape=value.shape)],
            name=f"/{name}/Cast",
        )
        maker = value.producer()
        if maker is not None:
            self._graph.insert_after(maker, cast)
        else:
            self._graph.insert_before(self._graph[0], cast)
        return cast.outputs[0]

    def _output(self, value: ir.Value) -> ir.Value:
        """An output of the network, which stays float32 and keeps its name."""
        maker = value.producer()
        if value.dtype != self._half and (maker is None or maker.op_type != "DequantizeLinear"):
            return value
        made = self._in_type(value, _FLOAT)
        if made is not value:
            name = value.name
            value.name = self._unused(f"{name}.{self._half.name.lower()}")
            made.name = name
        return made

    def _remove_unused(self) -> None:
        read = {value for node in self._graph for value in node.inputs} | set(self._graph.outputs)
        for node in list(self._graph):
            if node.op_type == "DequantizeLinear" and not read & set(node.outputs):
                self._graph.remove(node, safe=True)
        read = {value for node in self._graph for value in node.inputs} | set(self._graph.outputs)
        for name, value in list(self._graph.initializers.items()):
            if value not in read:
                del self._graph.initializers[name]

    def _unused(self, name: str) -> str:
        found = unused_name(name, self._names)
        self._names.add(found)
        return found


def store_floats_as(model: ir.Model, kind: HalfType, batches: Iterable[Mapping[str, np.ndarray]]) -> list[KeptFloat32]:
    """Rewrites ``model``, whose floats are float32, in place, so that what is not INT8 computes in ``kind``.

    ``batches`` are inputs by name, on which the largest values are measured; of each batch the first few are used.
    Returns the nodes that stay in float32, and says how many those are.
    """
    ShapeInferencePass()(model)  # types that the file does not state
    kept = HalfFloats(model, kind, largest_magnitudes(model, batches)).rewrite()
    reasons = Counter(one.reason for one in kept)
    why = [f"{count} ({reason})" for reason, count in reasons.most_common(3)] + ["..."] * (len(reasons) > 3)
    say(f"what is not INT8 computes in {kind}; nodes that stay in float32: {', '.join(why) or 'none'}")
    return kept


def largest_magnitudes(model: ir.Model, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """The largest magnitude of each float32 tensor that ``model`` makes from ``batches``, by ONNX Runtime."""
    made = [value for node in model.graph for value in node.outputs if value.dtype == _FLOAT and value.name]
    found = {str(value.name): 0.0 for value in made}
    running = session_with_tensors(ir.to_proto(model), found)
    for given in islice(batches, _BATCHES_MEASURED):
        few = {name: x[:_IMAGES_MEASURED] for name, x in given.items()}
        for name, values in run(running, few).items():
            if name in found:
                finite = values[np.isfinite(values)]
                found[name] = max(found[name], float(np.abs(finite).max(initial=0)))
    return found


def _least(scale: ir.Value | None) -> float:
    if scale is None or scale.const_value is None:
        return 0.0
    return float(scale.const_value.numpy().min())
