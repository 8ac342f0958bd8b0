"""Operators that stand for single ONNX nodes while a network passes through torch.onnx.

PyTorch's exporter decomposes what it knows: adaptive pooling into ReduceMean and Reshape, a flatten of a dynamic batch
into shape arithmetic, fake quantization into a form that TensorRT refuses. It does not decompose a custom operator. The
table at the end says which ONNX nodes each operator becomes. In PyTorch the operators compute the same as those nodes,
so that the exported network can be compared with the module that it came from.

As in ONNX, the type of a zero point is the type of the codes: it says which number format they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from onnxscript import opset20 as op
from torch import Tensor

from qat.base.number_format import NumberFormat, format_of_codes
from qat.fake_quantize.quantizer import per_channel, quantize


def codes_dtype(number_format: NumberFormat) -> torch.dtype:
    """The type of tensors that hold codes of ``number_format``."""
    dtype = getattr(torch, number_format.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


@torch.library.custom_op("int8::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """QuantizeLinear + DequantizeLinear: float32 x of any shape; scale [] float32; zero_point [] of the codes' type."""
    number_format = format_of_codes(str(zero_point.dtype).removeprefix("torch."))
    return quantize(x, scale, number_format).mul_(scale)


@torch.library.custom_op("int8::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """DequantizeLinear of a weight's codes; scale [C] float32 and zero_point [C] of the codes' type, along ``axis``."""
    return codes.float() * per_channel(scale, codes.ndim, axis)


@torch.library.custom_op("int8::dequantize_input", mutates_args=())
def dequantize_input(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """DequantizeLinear of an input: codes of any shape; scale [] float32; zero_point [] of the codes' type."""
    return codes.float() * scale


@torch.library.custom_op("int8::global_average_pool", mutates_args=())
def global_average_pool(x_NCHW: Tensor) -> Tensor:
    """GlobalAveragePool: [N, C, H, W] -> [N, C, 1, 1]."""
    return x_NCHW.mean(dim=(2, 3), keepdim=True)


@torch.library.custom_op("int8::flatten", mutates_args=())
def flatten(x: Tensor) -> Tensor:
    """Flatten(axis=1): [N, ...] -> [N, product of the rest]."""
    return x.flatten(1).clone()


@torch.library.custom_op("int8::clip", mutates_args=())
def clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clip: x of any shape between low [] and high []."""
    return x.clamp(low, high)


@torch.library.custom_op("int8::batch_norm", mutates_args=())
def batch_norm(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> Tensor:
    """BatchNormalization of x [N, C, ...]; scale, bias, mean and variance [C]."""
    return F.batch_norm(x, mean, variance, scale, bias, eps=epsilon)


@torch.library.custom_op("int8::instance_norm", mutates_args=())
def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """InstanceNormalization of x [N, C, L], each channel of each image by itself; scale and bias [C]."""
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@dequantize_input.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@global_average_pool.register_fake
def _(x_NCHW: Tensor) -> Tensor:
    return x_NCHW.new_empty((*x_NCHW.shape[:2], 1, 1))


@flatten.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.flatten(1).shape)


@clip.register_fake
def _(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.empty_like(x)


@batch_norm.register_fake
def _(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


@instance_norm.register_fake
def _(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


def _onnx_quantize_dequantize(x: Any, scale: Any, zero_point: Any) -> Any:
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)


def _onnx_dequantize(codes: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    return op.DequantizeLinear(codes, scale, zero_point, axis=axis)


def _onnx_dequantize_input(codes: Any, scale: Any, zero_point: Any) -> Any:
    return op.DequantizeLinear(codes, scale, zero_point)


def _onnx_global_average_pool(x_NCHW: Any) -> Any:
    return op.GlobalAveragePool(x_NCHW)


def _onnx_flatten(x: Any) -> Any:
    return op.Flatten(x, axis=1)


def _onnx_clip(x: Any, low: Any, high: Any) -> Any:
    return op.Clip(x, low, high)


def _onnx_batch_norm(x: Any, scale: Any, bias: Any, mean: Any, variance: Any, epsilon: float) -> Any:
    return op.BatchNormalization(x, scale, bias, mean, variance, epsilon=epsilon)


def _onnx_instance_norm(x: Any, scale: Any, bias: Any, epsilon: float) -> Any:
    return op.InstanceNormalization(x, scale, bias, epsilon=epsilon)


def _onnx_gelu(x: Any, approximate: str = "none") -> Any:
    """In operators that every operator set has: TensorRT 8.6 does not know Gelu."""

    def constant(value: float) -> Any:
        made: Any = op.Constant(value_float=value)
        return op.CastLike(made, x)

    if approximate == "tanh":
        cube = op.Mul(constant(0.044715), op.Mul(x, op.Mul(x, x)))
        bent = op.Tanh(op.Mul(constant(math.sqrt(2 / math.pi)), op.Add(x, cube)))
    else:
        bent = op.Erf(op.Mul(constant(math.sqrt(0.5)), x))
    return op.Mul(op.Mul(constant(0.5), x), op.Add(bent, constant(1.0)))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.int8.quantize_dequantize.default: _onnx_quantize_dequantize,
    torch.ops.int8.dequantize.default: _onnx_dequantize,
    torch.ops.int8.dequantize_input.default: _onnx_dequantize_input,
    torch.ops.int8.global_average_pool.default: _onnx_global_average_pool,
    torch.ops.int8.flatten.default: _onnx_flatten,
    torch.ops.int8.clip.default: _onnx_clip,
    torch.ops.int8.batch_norm.default: _onnx_batch_norm,
    torch.ops.int8.instance_norm.default: _onnx_instance_norm,
    torch.ops.aten.gelu.default: _onnx_gelu,
}
"""PyTorch operator -> the function that writes its ONNX nodes."""
OPSET = 20
"""The operator set of the files that are exported from PyTorch."""
