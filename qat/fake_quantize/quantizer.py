"""The numerics of this project: symmetric INT8 fake quantization. This file is the specification.

    scale  = max(amax / 127, SCALE_FLOOR)                   zero point 0
    code   = clamp(round_half_even(x / scale), low, high)   quotient in float32, also under autocast
    x_hat  = code * scale
    dL/dx  = dL/dx_hat where low <= x / scale <= high, else 0        (straight-through estimator)

Activations have one scale per tensor and codes in [-128, 127]. Fused with a ReLU before it, a quantizer has codes in
[0, 127] and no gradient where x <= 0. Weights have one scale per output channel and codes in [-127, 127]; weights of
transposed convolutions have one scale. Their amax follows the weights (amax = max |w| of the channel), so no code is
ever clamped, and TensorRT, which clamps weights to -128, computes the same. The amax of a weight may also be fixed or
learned; weights beyond it are then clamped.

Learned step sizes (LSQ, Esser et al. 2020): if amax is a parameter,

    dL/dscale = g * sum dL/dx_hat * (code - x / scale  inside the range, low below it, high above it)
    g         = 1 / sqrt(elements per scale * high)

127, -128 and -127 come from the number format (qat/base/number_format.py); a simulation of fewer bits has another
format (qat/fake_quantize/low_bit.py).

Shapes: amax and scale are [] (per tensor, ``axis`` None) or [C] (per channel, along ``axis``); C = output channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat.base.number_format import INT8, NumberFormat

# TensorRT refuses a scale of zero, and a subnormal scale loses digits: the floor is the smallest normal float32.
SCALE_FLOOR = torch.finfo(torch.float32).tiny
_FLOAT32_STEP = torch.finfo(torch.float32).eps


ACTIVATION = INT8
WEIGHT = INT8.narrow()


def scale_from_amax(amax: Tensor, number_format: NumberFormat = ACTIVATION) -> Tensor:
    """The scale for a tensor whose largest magnitude is ``amax`` (same shape, float32, > 0)."""
    return _scale(amax, number_format.high)


def quantize(x: Tensor, scale: Tensor, number_format: NumberFormat) -> Tensor:
    """Codes of ``x`` as float32 integers, same shape; ``scale`` broadcasts against ``x``."""
    return _codes(x, scale, number_format.low, number_format.high)


def fake_quantize(x: Tensor, scale: Tensor, number_format: NumberFormat = ACTIVATION) -> Tensor:
    """``x`` rounded to its codes and scaled back, in the type of ``x``, with the straight-through gradient.

    Args:
        x: any shape, floating point.
        scale: float32, > 0; broadcasts against ``x``. Gets no gradient.
        number_format: the allowed codes.
    """
    x_hat: Tensor = _FakeQuantize.apply(x, scale, number_format.low, number_format.high)
    return x_hat


def learned_fake_quantize(x: Tensor, scale: Tensor, number_format: NumberFormat = ACTIVATION) -> Tensor:
    """Like ``fake_quantize``, but ``scale`` gets the gradient of learned step sizes."""
    x_hat: Tensor = _LearnedFakeQuantize.apply(x, scale, number_format.low, number_format.high)
    return x_hat


def fake_quantize_weight(weight: Tensor, axis: int | None, number_format: NumberFormat = WEIGHT) -> Tensor:
    """``weight`` fake-quantized per channel of ``axis``, with scales that follow it; the gradient passes unchanged.

    ``axis`` None: with one scale.
    """
    weight_hat: Tensor = _FakeQuantizeWeight.apply(weight, axis, number_format.high)
    return weight_hat


def weight_amax(weight: Tensor, axis: int | None) -> Tensor:
    """Largest magnitude in each channel of ``axis``, [C], or of all, []; float32."""
    # Both extremes, because |weight| would make a copy of the weights in every training step.
    rows = weight_rows(weight, axis)
    return torch.maximum(rows.amax(dim=-1), -rows.amin(dim=-1)).float()


def weight_rows(weight: Tensor, axis: int | None) -> Tensor:
    """The weights that share a scale, along the last dimension: [C, K] for the channels of ``axis``, or [K]."""
    # Rows of a matrix, because reducing one dimension is faster on a CPU than reducing three.
    return weight.detach().flatten() if axis is None else weight.detach().transpose(0, axis).flatten(1)


def per_channel(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    """Reshapes [C] so that it broadcasts along ``axis`` of a tensor with ``ndim`` dimensions, or [] along all."""
    shape = [1] * ndim
    if axis is not None:
        shape[axis] = -1
    return values.reshape(shape)


class ActivationQuantizer(nn.Module):
    """Fake-quantizes one activation tensor, per tensor.

    ``amax`` is NaN until calibration sets it; it may become a parameter (``learn``). While ``observer`` is set, it gets
    the input, which passes through unchanged; while ``enabled`` is False, the input only passes through.
    """

    amax: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("amax", torch.tensor(float("nan")))
        self.observer: Callable[[Tensor], None] | None = None
        self.enabled = True
        self.format = ACTIVATION

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` of any shape to the same shape and type."""
        if self.observer is not None:
            self.observer(x)
        return x if self.passes else self._fake_quantize(x, self.format.low)

    def fake_quantize_relu(self, x: Tensor) -> Tensor:
        """Fake-quantizes relu(x) in one operation. Call it only if not ``passes``."""
        return self._fake_quantize(x, 0)

    @property
    def passes(self) -> bool:
        """Whether the input passes through unchanged."""
        return self.observer is not None or not self.enabled

    def _fake_quantize(self, x: Tensor, low: int) -> Tensor:
        function = _LearnedFakeQuantize if isinstance(self.amax, nn.Parameter) else _FakeQuantize
        high = self.format.high
        x_hat: Tensor = function.apply(x, _scale(self.amax, high), low, high)
        return x_hat

    def learn(self) -> None:
        """Makes ``amax`` a parameter with its present value."""
        _learn(self)

    def extra_repr(self) -> str:
        """The text that ``print(model)`` shows."""
        return f"amax={self.amax.item():.4g}, {self.format}, per tensor"


class WeightQuantizer(nn.Module):
    """Fake-quantizes a constant weight with one scale per channel of ``axis``; with one scale if ``axis`` is None.

    ``amax``, [C] or [], is None while it follows the weight; it may be fixed (``fix``) and become a parameter
    (``learn``).
    """

    amax: Tensor | None

    def __init__(self, axis: int | None) -> None:
        super().__init__()
        self.axis = axis
        self.enabled = True
        self.format = WEIGHT
        self.register_buffer("amax", None)

    def forward(self, weight: Tensor) -> Tensor:
        """Maps ``weight`` to the same shape and type."""
        if not self.enabled:
            return weight
        if self.amax is None:
            return fake_quantize_weight(weight, self.axis, self.format)
        quantized = learned_fake_quantize if isinstance(self.amax, nn.Parameter) else fake_quantize
        return quantized(weight, per_channel(self.scale(weight), weight.ndim, self.axis), self.format)

    def scale(self, weight: Tensor) -> Tensor:
        """The scales of ``weight``: [C] or [], float32, > 0."""
        return scale_from_amax(weight_amax(weight, self.axis) if self.amax is None else self.amax, self.format)

    def fix(self, amax: Tensor) -> None:
        """Fixes the range of the weight at ``amax``, [C] or []."""
        self.amax = amax.detach().float().clone()

    def learn(self) -> None:
        """Makes ``amax``, which must be fixed, a parameter."""
        assert self.amax is not None, "fix the range first"
        _learn(self)

    def extra_repr(self) -> str:
        """The text that ``print(model)`` shows."""
        return f"{self.format}, per tensor" if self.axis is None else f"axis={self.axis}, {self.format}, per channel"


def _learn(quantizer: nn.Module) -> None:
    amax = nn.Parameter(quantizer.get_buffer("amax").clone())
    del quantizer.amax
    quantizer.register_parameter("amax", amax)


# These are autograd functions, not x + (x_hat - x).detach(): that sum differs from x_hat by rounding, so the codes of
# training would not be exactly the codes of the engine.


def _scale(amax: Tensor, high: int) -> Tensor:
    return (amax.float() / high).clamp(min=SCALE_FLOOR)


def _codes(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (x.float() / scale).round_().clamp_(low, high)


def _open_bounds(low: int, high: int) -> tuple[float, float]:
    """Open bounds of the quotients inside the range: the next float32 beyond each end; for a ReLU, 0 is outside."""
    return low * (1 + _FLOAT32_STEP), high * (1 + _FLOAT32_STEP)


def _dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scale``; it may overwrite ``codes``."""
    # Not in place when compiled: torch 2.11 silently drops the gradient of a function that returns a tensor changed in
    # place, or one that .to() returned unchanged (github.com/pytorch/pytorch/issues/180642).
    values = codes * scale if torch.compiler.is_compiling() else codes.mul_(scale)
    return values if values.dtype == dtype else values.to(dtype)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.codes = (low, high)
        return _dequantize(_codes(x, scale, low, high), scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        low, high = ctx.codes
        # One pass over memory; comparisons and torch.where would take four.
        clipped = torch.ops.aten.hardtanh_backward(grad.float(), x.float() / scale, *_open_bounds(low, high))
        return clipped.to(grad.dtype), None, None, None


class _LearnedFakeQuantize(_FakeQuantize):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        low, high = ctx.codes
        quotient = x.float() / scale
        code = quotient.round().clamp(low, high)
        below, above = _open_bounds(low, high)
        inside = (quotient > below) & (quotient < above)
        of_scale = grad.float() * torch.where(inside, code - quotient, code)
        of_scale = of_scale.sum_to_size(scale.shape) / math.sqrt(x.numel() / scale.numel() * high)
        return torch.where(inside, grad, 0), of_scale, None, None


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, axis: int | None, high: int) -> Tensor:
        scale = per_channel(_scale(weight_amax(weight, axis), high), weight.ndim, axis)
        return _dequantize((weight.float() / scale).round_(), scale, weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None
