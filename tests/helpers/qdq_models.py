"""Tiny Q/DQ networks, node by node: the input of every test in this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SCALE = 0.01


class Graph:
    """Collects nodes and initializers; every node ``y`` of operator ``Op`` is called ``/y/Op``."""

    def __init__(self, seed: int = 0):
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def constant(self, name: str, values: object) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"/{output}/{op}", **attributes))
        return output

    def quantized(self, tensor: str, name: str, scale: float = 0.05, zero_point: object = np.int8(0)) -> str:
        """Q/DQ on an activation, one scale for the tensor."""
        constants = [
            self.constant(f"{name}_scale", np.float32(scale)),
            self.constant(f"{name}_zero", zero_point),
        ]
        codes = self.node("QuantizeLinear", [tensor, *constants], f"{name}_q")
        return self.node("DequantizeLinear", [codes, *constants], f"{name}_dq")

    def weights(
        self, name: str, shape: tuple[int, ...], axis: int = 0, scales: object = None, in_float: bool = False
    ) -> str:
        """INT8 weight codes behind a DequantizeLinear with one scale per index of ``axis``.

        ``in_float`` writes float weights behind QuantizeLinear and DequantizeLinear, which are the same codes.
        """
        codes = self._random.integers(-127, 128, shape).astype(np.int8)
        values = np.asarray(np.full(shape[axis], SCALE) if scales is None else scales, np.float32)
        along_axis = np.expand_dims(values, [index for index in range(len(shape)) if index != axis])
        weights = self.constant(name, codes * along_axis) if in_float else self.constant(f"{name}_q", codes)
        constants = [
            self.constant(f"{name}_scale", values),
            self.constant(f"{name}_zero", np.zeros(values.shape, np.int8)),
        ]
        if in_float:
            weights = self.node("QuantizeLinear", [weights, *constants], f"{name}_q", axis=axis)
        return self.node("DequantizeLinear", [weights, *constants], f"{name}_dq", axis=axis)

    def float_weights(self, name: str, shape: tuple[int, ...]) -> str:
        return self.constant(name, self._random.normal(size=shape).astype(np.float32))

    def save(self, path: Path, input_shape: tuple, output_shape: tuple, input_type: int = TensorProto.FLOAT) -> Path:
        """Writes the network from ``input`` to the last node's output."""
        tensors = [
            helper.make_tensor_value_info("input", input_type, input_shape),
            helper.make_tensor_value_info(self.nodes[-1].output[0], TensorProto.FLOAT, output_shape),
        ]
        graph = helper.make_graph(self.nodes, "tiny", tensors[:1], tensors[1:], self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, path)
        return path


def convolution(
    path: Path,
    *,
    batch: object = "N",
    size: object = 16,
    weight_scales: object = None,
    axis: int = 0,
    input_scale: float = 0.05,
    zero_point: object = np.int8(0),
) -> Path:
    """input -> Q/DQ -> Conv 3x3, 8 to 8 channels, INT8 weights -> Relu."""
    graph = Graph()
    x = graph.quantized("input", "x", input_scale, zero_point)
    weights = graph.weights("w", (8, 8, 3, 3), axis, weight_scales)
    graph.node("Conv", [x, weights], "conv", kernel_shape=[3, 3], pads=[1] * 4)
    graph.node("Relu", ["conv"], "relu")
    return graph.save(path, (batch, 8, size, size), (batch, 8, size, size))


def classifier(path: Path, *, quantize_fc: bool = True) -> Path:
    """Conv -> Relu -> Q/DQ -> GlobalAveragePool -> Flatten -> fully connected, with Q/DQ or in float."""
    graph = Graph()
    x = graph.quantized("input", "x")
    x = graph.node("Conv", [x, graph.weights("w", (16, 8, 3, 3))], "conv", kernel_shape=[3, 3], pads=[1] * 4)
    x = graph.node("Relu", [x], "relu")
    x = graph.node("GlobalAveragePool", [graph.quantized(x, "pool_in")], "pool")
    x = graph.node("Flatten", [x], "flat")
    if quantize_fc:
        x, weights = graph.quantized(x, "fc_in"), graph.weights("fc_w", (10, 16))
    else:
        weights = graph.float_weights("fc_w", (10, 16))
    graph.node("Gemm", [x, weights, graph.float_weights("fc_b", (10,))], "fc", transB=1)
    return graph.save(path, ("N", 8, 16, 16), ("N", 10))


def residual(
    path: Path,
    *,
    quantize: bool = True,
    weights_of: dict[str, int] | None = None,
    from_bytes: bool = False,
    float_weights: bool = False,
) -> Path:
    """A small classifier of [N, 3, 32, 32] with one residual block: its skip branch is quantized, once for both
    readers.

    ``weights_of`` gives single layers another seed for their weights; without ``quantize`` it is the float network;
    ``from_bytes`` takes uint8 [N, 32, 32, 3] and normalizes it; ``float_weights`` writes floats and a QuantizeLinear.
    """
    graph = Graph()

    def layer(op: str, x: str, name: str, shape: tuple[int, ...], **attributes: object) -> str:
        source = Graph((weights_of or {}).get(name, sum(map(ord, name))))
        fan_in = int(np.prod(shape[1:]))
        scale = (2 / fan_in) ** 0.5 / 73  # the codes' standard deviation is 73
        weights = source.weights(f"{name}_w", shape, scales=np.full(shape[0], scale), in_float=float_weights)
        if quantize:
            graph.initializers += source.initializers
            graph.nodes += source.nodes
        else:
            codes = numpy_helper.to_array(source.initializers[0])
            weights = graph.constant(f"{name}_w", (codes * np.float32(scale)).astype(np.float32))
        bias = graph.constant(f"{name}_b", np.zeros(shape[0], np.float32))
        return graph.node(op, [x, weights, bias], name, **attributes)

    def q(x: str, scale: float = 0.03) -> str:
        return graph.quantized(x, x, scale) if quantize else x

    image = "input"
    if from_bytes:
        image = graph.node("Cast", [image], "cast", to=TensorProto.FLOAT)
        image = graph.node("Transpose", [image], "turned", perm=[0, 3, 1, 2])
        image = graph.node(
            "Mul", [image, graph.constant("factor", np.full((1, 3, 1, 1), 1 / 64, np.float32))], "scaled"
        )
        image = graph.node("Add", [image, graph.constant("shift", np.full((1, 3, 1, 1), -2, np.float32))], "image")
    padded = {"kernel_shape": [3, 3], "pads": [1] * 4}
    x = graph.node("Relu", [layer("Conv", q(image), "stem", (32, 3, 3, 3), **padded)], "stem_relu")
    skip = q(x)
    x = graph.node("Relu", [layer("Conv", skip, "conv1", (32, 32, 3, 3), **padded)], "relu1")
    x = layer("Conv", q(x), "conv2", (32, 32, 3, 3), **padded)
    x = graph.node("Relu", [graph.node("Add", [x, skip], "add")], "relu2")
    x = graph.node("Flatten", [graph.node("GlobalAveragePool", [q(x)], "pool")], "flat")
    layer("Gemm", q(x, 0.01), "logits", (10, 32), transB=1)
    if from_bytes:
        return graph.save(path, ("N", 32, 32, 3), ("N", 10), TensorProto.UINT8)
    return graph.save(path, ("N", 3, 32, 32), ("N", 10))


def bottleneck(path: Path, *, zeros: int = 0) -> Path:
    """input -> Q/DQ -> Conv 3x3 -> Relu -> Q/DQ -> Conv 1x1 -> Add with the input's DQ; 32, 64 and 32 channels.

    ``zeros`` more channels between the two convolutions are zero, and change no answer.
    """
    graph = Graph()
    skip = graph.quantized("input", "x")
    inputs = [skip, graph.weights("a_w", (64, 32, 3, 3)), graph.float_weights("a_b", (64,))]
    x = graph.node("Relu", [graph.node("Conv", inputs, "a", kernel_shape=[3, 3], pads=[1] * 4)], "relu")
    inputs = [graph.quantized(x, "between"), graph.weights("b_w", (32, 64, 1, 1))]
    graph.node("Add", [graph.node("Conv", inputs, "b", kernel_shape=[1, 1]), skip], "add")
    for tensor in graph.initializers:
        if tensor.name in ("a_w_q", "a_w_scale", "a_w_zero", "a_b", "b_w_q"):
            values = numpy_helper.to_array(tensor)
            more = [(0, 0)] * values.ndim
            more[1 if tensor.name == "b_w_q" else 0] = (0, zeros)
            padded = np.pad(values, more, constant_values=1 if tensor.name == "a_w_scale" else 0)
            tensor.CopyFrom(numpy_helper.from_array(padded, tensor.name))
    return graph.save(path, ("N", 32, 8, 8), ("N", 32, 8, 8))


def siblings(path: Path) -> Path:
    """Three convolutions 1x1 of one tensor, each with Relu and Q/DQ of its own, then concatenated: an inception block,
    whose three convolutions TensorRT merges into one."""
    graph = Graph()
    x = graph.quantized("input", "x")
    branches = []
    for index, channels in enumerate((32, 64, 32)):
        inputs = [x, graph.weights(f"w{index}", (channels, 32, 1, 1)), graph.float_weights(f"b{index}", (channels,))]
        relu = graph.node("Relu", [graph.node("Conv", inputs, f"branch{index}", kernel_shape=[1, 1])], f"relu{index}")
        branches.append(graph.quantized(relu, f"y{index}", 0.05 * (index + 1)))
    inputs = [
        graph.quantized(graph.node("Concat", branches, "cat", axis=1), "z", 0.1),
        graph.weights("w", (32, 128, 1, 1)),
    ]
    graph.node("Conv", inputs, "last", kernel_shape=[1, 1])
    return graph.save(path, ("N", 32, 8, 8), ("N", 32, 8, 8))


def merged_shortcut(path: Path) -> Path:
    """The end of a residual block as export.onnx --merge-shortcuts writes it: a convolution 3x3 of stride 2 and a max
    pool 1x1 that skips as many pixels, concatenated under one scale, and a convolution 1x1 of both."""
    graph = Graph()
    x = graph.quantized("input", "x")
    inputs = [x, graph.weights("a_w", (64, 32, 3, 3)), graph.float_weights("a_b", (64,))]
    inner = graph.node("Conv", inputs, "a", kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    inner = graph.quantized(graph.node("Relu", [inner], "a_relu"), "inner")
    seen = graph.quantized(graph.node("MaxPool", [x], "pixels", kernel_shape=[1, 1], strides=[2, 2]), "seen")
    both = graph.quantized(graph.node("Concat", [inner, seen], "cat", axis=1), "both")
    inputs = [both, graph.weights("b_w", (128, 96, 1, 1)), graph.float_weights("b_b", (128,))]
    graph.node("Relu", [graph.node("Conv", inputs, "b", kernel_shape=[1, 1])], "relu")
    return graph.save(path, ("N", 32, 16, 16), ("N", 128, 8, 8))


def transposed_convolution(path: Path) -> Path:
    """input -> Q/DQ -> ConvTranspose 2x2 with INT8 weights, which TensorRT-RTX 1.7 runs in float."""
    graph = Graph()
    inputs = [graph.quantized("input", "x"), graph.weights("w", (16, 16, 2, 2), axis=1)]
    graph.node("ConvTranspose", inputs, "up", kernel_shape=[2, 2], strides=[2, 2])
    return graph.save(path, ("N", 16, 8, 8), ("N", 16, 16, 16))


def upsampling(path: Path) -> Path:
    """input [N, 64, 28, 28] -> transposed convolution 2x2 -> convolution 3x3 [N, 64, 56, 56], all of it INT8."""
    graph = Graph()
    x = graph.quantized("input", "x")
    small = np.full(32, SCALE / 10)
    inputs = [x, graph.weights("u_w", (64, 32, 2, 2), 1, small), graph.float_weights("u_b", (32,))]
    up = graph.node("ConvTranspose", inputs, "up", kernel_shape=[2, 2], strides=[2, 2])
    inputs = [graph.quantized(up, "y"), graph.weights("c_w", (64, 32, 3, 3)), graph.float_weights("c_b", (64,))]
    graph.node("Conv", inputs, "conv", kernel_shape=[3, 3], pads=[1] * 4)
    return graph.save(path, ("N", 64, 28, 28), ("N", 64, 56, 56))


def matrix_product(path: Path, *, axis: int, transpose: bool = False) -> Path:
    """input -> Q/DQ -> MatMul with INT8 weights, scales along ``axis``; ``transpose`` stores them turned."""
    graph = Graph()
    x = graph.quantized("input", "x")
    weights = graph.weights("w", (10, 16) if transpose else (16, 10), axis)
    if transpose:
        weights = graph.node("Transpose", [weights], "wt", perm=[1, 0])
    graph.node("MatMul", [x, weights], "fc")
    return graph.save(path, ("N", 16), ("N", 10))


def foreign_operator(path: Path, op: str) -> Path:
    """A quantized convolution whose output goes into an operator that TensorRT does not have."""
    graph = Graph()
    inputs = [graph.quantized("input", "x"), graph.weights("w", (8, 8, 1, 1))]
    graph.node("Conv", inputs, "conv", kernel_shape=[1, 1])
    graph.node(op, ["conv"], "odd")
    return graph.save(path, ("N", 8, 4, 4), ("N", 8, 4, 4))


def quantized_bias(path: Path) -> Path:
    """A convolution whose bias is INT32 behind a DequantizeLinear, as ONNX Runtime's quantizer writes it."""
    graph = Graph()
    inputs = [graph.quantized("input", "x"), graph.weights("w", (8, 8, 1, 1))]
    bias = [
        graph.constant("b_q", np.arange(8, dtype=np.int32)),
        graph.constant("b_scale", np.full(8, SCALE, np.float32)),
        graph.constant("b_zero", np.zeros(8, np.int32)),
    ]
    inputs.append(graph.node("DequantizeLinear", bias, "b_dq", axis=0))
    graph.node("Conv", inputs, "conv", kernel_shape=[1, 1])
    return graph.save(path, ("N", 8, 4, 4), ("N", 8, 4, 4))
