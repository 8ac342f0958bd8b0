"""ONNX graphs made node by node: the input of the lint's tests. A tensor is called after the node that makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

IR_VERSION = 10


class Graph:
    """Collects nodes and initializers; nodes must be added before those that read them."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}
        self._random = np.random.default_rng(0)

    def constant(self, name: str, value: Any) -> str:
        self.initializers[name] = np.asarray(value)
        return name

    def node(self, op: str, inputs: list[str], name: str, outputs: list[str] | None = None, **attributes: Any) -> str:
        """The name of its first output; by default it has one, called ``name``."""
        made = outputs or [name]
        self.nodes.append(helper.make_node(op, inputs, made, name, **attributes))
        return made[0]

    def random(self, name: str, shape: tuple[int, ...]) -> str:
        return self.constant(name, self._random.normal(size=shape).astype(np.float32))

    def qdq(self, tensor: str, scale: float = 0.05, name: str | None = None) -> str:
        """Q and DQ of an activation, named after the tensor."""
        name = name or tensor
        given = [self.constant(f"{name}/scale", np.float32(scale)), self.constant(f"{name}/zero", np.int8(0))]
        codes = self.node("QuantizeLinear", [tensor, *given], f"{name}/quantize")
        return self.node("DequantizeLinear", [codes, *given], f"{name}/dequantize")

    def codes(self, name: str, shape: tuple[int, ...], axis: int = 0) -> str:
        """INT8 weights behind DequantizeLinear, one scale for each index of ``axis``."""
        given = [
            self.constant(name, self._random.integers(-127, 128, shape).astype(np.int8)),
            self.constant(f"{name}/scale", np.full(shape[axis], 0.01, np.float32)),
            self.constant(f"{name}/zero", np.zeros(shape[axis], np.int8)),
        ]
        return self.node("DequantizeLinear", given, f"{name}/dequantize", axis=axis)

    def conv(
        self, x: str, name: str, inputs: int, outputs: int, kernel: int = 3, group: int = 1, *, quantized: bool = True
    ) -> str:
        """A convolution with padding and a bias; its weight is INT8 where it is ``quantized``."""
        shape = (outputs, inputs // group, kernel, kernel)
        weight = self.codes(f"{name}.w", shape) if quantized else self.random(f"{name}.w", shape)
        bias = self.constant(f"{name}.b", np.zeros(outputs, np.float32))
        pads = [kernel // 2] * 4
        return self.node("Conv", [x, weight, bias], name, kernel_shape=[kernel] * 2, pads=pads, group=group)

    def model(
        self,
        shape: tuple[Any, ...] = ("N", 16, 8, 8),
        outputs: list[str] | None = None,
        opset: int = 20,
        dtype: int = TensorProto.FLOAT,
        output_dtype: int = TensorProto.FLOAT,
    ) -> onnx.ModelProto:
        """A model that takes ``x`` and gives the last node's output, or ``outputs``."""
        ends = outputs or [self.nodes[-1].output[0]]
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info("x", dtype, shape)],
            [helper.make_tensor_value_info(name, output_dtype, None) for name in ends],
            [numpy_helper.from_array(value, name) for name, value in self.initializers.items()],
        )
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path
