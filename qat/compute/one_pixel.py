"""For training on a CPU: a convolution that makes one pixel is computed as the matrix product that it is.

Networks made for photographs make such pixels of small images: of 32x32 pixels, all that the last stage of ResNet50
makes. Most of a 3x3 kernel then lies on padding and does nothing, but oneDNN, where the processor has no AVX-512, goes
through the gradient of the whole kernel once for each image. The results are the same but for rounding.

    y[n, o] = bias[o] + sum over c, i, j of x[n, c, i, j] * weight[o, c, padding + i, padding + j]

Layouts: N images, C channels, O output channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class OnePixelProducts(nn.Module):
    """``model``, whose convolutions that make one pixel are computed as matrix products."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """What ``model`` makes of ``x`` [N, ...]."""
        with _Products():
            return self.model(x)


class _Products(TorchFunctionMode):
    """While it lasts, ``conv2d`` below is called in the place of torch's."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        return (conv2d if function is torch.conv2d else function)(*arguments, **(named or {}))


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.conv2d``, as a matrix product where it makes one pixel: [N, C, H, W] -> [N, O, 1, 1]."""
    if not isinstance(padding, str) and groups == 1 and _pair(dilation) == (1, 1) and input.ndim == 4:
        spans = [
            _span(*sizes)
            for sizes in zip(input.shape[2:], weight.shape[2:], _pair(stride), _pair(padding), strict=True)
        ]
        if all(spans):
            on_image, in_kernel = ((..., *slices) for slices in zip(*spans, strict=True))
            return F.linear(input[on_image].flatten(1), weight[in_kernel].flatten(1), bias)[:, :, None, None]
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _span(size: int, kernel: int, stride: int, padding: int) -> tuple[slice, slice] | tuple[()]:
    """Where image and kernel lie on each other, of the one and of the other; () where not once, at the first pixel."""
    length = min(size, kernel - padding)
    if not 0 <= size + 2 * padding - kernel < stride or length < 1:
        return ()
    return slice(0, length), slice(padding, padding + length)


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
