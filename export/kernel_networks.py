"""Small ONNX networks around one layer, to measure what the layer gains by INT8 (deploy.kernels). Needs no torch.

    input -> 1x1 convolution -> ReLU -> the layer -> its activation -> 1x1 convolution -> output

Both convolutions are INT8. The layer is INT8 too, or float: that is the decision a placement makes. A layer with fewer
than 16 input channels is the first of its network, and one with fewer than 16 output channels the last, as in practice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.float_types import store_floats_as
from qat.base.number_format import INT8
from qat.rules.kernel_profile import Activation, LayerKind, Operation, WeightScales

LAYER = "layer"
"""Name of the node in question; of a gate, of its product."""
_FEW = 16
_OUTSIDE = 16  # channels of the network's input and output
_ACTIVATION_SCALE, _WEIGHT_SCALE = 0.05, 0.01


def write_kernel_network(path: Path, kind: LayerKind, batch: int, *, quantized: bool, half: bool = False) -> None:
    """Writes the network of a kind for a fixed batch, with the layer in INT8 if ``quantized``, else in float.

    With ``half`` what is not INT8 computes in float16.
    """
    network = _Network()
    rows = (batch * kind.pixels,) if kind.operation == "linear" else ()
    first, last = kind.in_channels < _FEW, kind.out_channels < _FEW
    channels = kind.in_channels if first else _OUTSIDE
    shape = (*rows, channels) if rows else (batch, channels, kind.pixels, kind.pixels)
    outside: Operation = "linear" if rows else "convolution"
    x = "input"
    if not first:
        stem = LayerKind(operation=outside, in_channels=channels, out_channels=kind.in_channels)
        x = network.relu(network.weighted(x, "stem", stem, quantized=True))
    x = network.layer(x, kind, quantized)
    x = network.activation(x, kind.activation, quantized)
    if not last:
        head = LayerKind(operation=outside, in_channels=kind.out_channels, out_channels=_OUTSIDE)
        network.weighted(x, "head", head, quantized=True)
    network.save(path, shape)
    if half:
        model = ir.load(path)
        store_floats_as(model, "float16", [])
        ir.save(model, path)


class _Network:
    def __init__(self) -> None:
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}
        self._quantized: dict[str, str] = {}  # tensor -> its dequantized codes
        self._random = np.random.default_rng(0)

    def layer(self, x: str, kind: LayerKind, quantized: bool) -> str:
        """The layer in question."""
        if kind.operation == "average_pool":
            return self._average_pool(self._codes(x) if quantized else x, kind)
        if kind.operation == "gate":
            return self._gate(x, kind, quantized)
        if kind.operation == "shuffled_convolution":
            return self._shuffled(x, kind, quantized)
        return self.weighted(x, LAYER, kind, quantized=quantized)

    def weighted(self, x: str, name: str, kind: LayerKind, *, quantized: bool) -> str:
        """A convolution or linear layer."""
        transposed = kind.operation == "transposed_convolution"
        shape: tuple[int, ...] = (kind.out_channels, kind.group_width, *kind.kernel)
        if kind.operation == "linear":
            shape = (kind.out_channels, kind.in_channels)
        elif transposed:
            shape = (kind.in_channels, kind.out_channels // kind.groups, *kind.kernel)
        weight = self._weight(name, shape, kind.weight_scales if quantized else None, transposed)
        inputs = [self._codes(x) if quantized else x, weight, self._constant(f"{name}_b", np.zeros(kind.out_channels))]
        if kind.operation == "linear":
            return self._node("Gemm", inputs, name, transB=1)
        reach = [kind.dilation * (extent - 1) + 1 for extent in kind.kernel]
        attributes = {  # TensorRT 8.6 takes the extents from here where the weight is dequantized
            "kernel_shape": kind.kernel,
            "group": kind.groups,
            "strides": [kind.stride] * 2,
            "dilations": [kind.dilation] * 2,
        }
        if transposed:  # the output is ``stride`` times as large
            over = [max(0, extent - kind.stride) for extent in reach]
            pads = [extent // 2 for extent in over]
            return self._node(
                "ConvTranspose",
                inputs,
                name,
                pads=[*pads, *(a - b for a, b in zip(over, pads, strict=True))],
                **attributes,
            )
        patches = kind.stride == min(kind.kernel) and kind.stride > 1
        pads = [0 if patches else extent // 2 for extent in reach]
        return self._node("Conv", inputs, name, pads=pads * 2, **attributes)

    def relu(self, x: str) -> str:
        return self._node("Relu", [x], f"{x}_relu")

    def activation(self, x: str, activation: Activation, quantized: bool) -> str:
        """What stands behind the layer; a swish as exporters write it."""
        if activation == "relu":
            return self.relu(x)
        if activation == "swish of codes" and quantized:
            x = self._codes(x)
        return self._node("Mul", [x, self._node("Sigmoid", [x], f"{x}_sigmoid")], f"{x}_swish")

    def save(self, path: Path, input_shape: tuple[int, ...]) -> None:
        """Writes the network; the last node's output is its output."""
        ends = [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, input_shape),
            helper.make_tensor_value_info(self._nodes[-1].output[0], TensorProto.FLOAT, [None] * len(input_shape)),
        ]
        constants = [numpy_helper.from_array(values, name) for name, values in self._constants.items()]
        graph = helper.make_graph(self._nodes, "kernel", ends[:1], ends[1:], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(onnx.shape_inference.infer_shapes(model), path)

    def _average_pool(self, x: str, kind: LayerKind) -> str:
        if not any(kind.kernel):
            return self._node("GlobalAveragePool", [x], LAYER)
        pads = [0 if kind.stride > 1 else extent // 2 for extent in kind.kernel] * 2
        return self._node("AveragePool", [x], LAYER, kernel_shape=kind.kernel, strides=[kind.stride] * 2, pads=pads)

    def _gate(self, x: str, kind: LayerKind, quantized: bool) -> str:
        """x * sigmoid(1x1 convolution of the mean of x)."""
        mean = self._node("GlobalAveragePool", [self._codes(x) if quantized else x], "mean")
        linear = LayerKind(operation="convolution", in_channels=kind.in_channels, out_channels=kind.out_channels)
        gate = self._node("Sigmoid", [self.weighted(mean, "gate", linear, quantized=False)], "sigmoid")
        return self._node("Mul", [self._codes(x) if quantized else x, gate], LAYER)

    def _shuffled(self, x: str, kind: LayerKind, quantized: bool) -> str:
        """A 1x1 convolution, whose channels become pixels."""
        channels = kind.out_channels * kind.stride**2
        convolution = LayerKind(operation="convolution", in_channels=kind.in_channels, out_channels=channels)
        made = self.weighted(x, LAYER, convolution, quantized=quantized)
        return self._node("DepthToSpace", [made], "shuffled", blocksize=kind.stride, mode="CRD")

    def _codes(self, x: str) -> str:
        """``x`` behind a QuantizeLinear and a DequantizeLinear, which all its readers share."""
        if x not in self._quantized:
            scale = [self._constant(f"{x}_scale", _ACTIVATION_SCALE), self._constant(f"{x}_zero", 0, np.int8)]
            codes = self._node("QuantizeLinear", [x, *scale], f"{x}_q")
            self._quantized[x] = self._node("DequantizeLinear", [codes, *scale], f"{x}_dq")
        return self._quantized[x]

    def _weight(self, name: str, shape: tuple[int, ...], scales: WeightScales | None, transposed: bool) -> str:
        codes = self._random.integers(-INT8.high, INT8.high + 1, shape)
        if scales is None:
            return self._constant(f"{name}_w", codes * _WEIGHT_SCALE)
        axis = None if scales == "tensor" else int((scales == "input") != transposed)
        count = () if axis is None else (shape[axis],)
        inputs = [
            self._constant(f"{name}_w", codes, np.int8),
            self._constant(f"{name}_w_scale", np.full(count, _WEIGHT_SCALE)),
            self._constant(f"{name}_w_zero", np.zeros(count), np.int8),
        ]
        along: dict[str, Any] = {} if axis is None else {"axis": axis}
        return self._node("DequantizeLinear", inputs, f"{name}_w_dq", **along)

    def _constant(self, name: str, values: object, dtype: type = np.float32) -> str:
        self._constants[name] = np.asarray(values, dtype)
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output
