"""For training on a CPU: a convolution whose output is one pixel is computed as a matrix product.

Networks that were made for photographs have many such convolutions when the images are small: with images of 32x32
pixels, the whole last stage of ResNet50. Most of a 3x3 kernel then lies on padding and has no effect. Without AVX-512,
oneDNN still reads and writes the gradient of the whole kernel once for each image of the batch. In the matrix product,
only the part of the kernel that covers the image takes part. Results and gradients differ only by rounding.

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
    """``model``, with convolutions whose output is one pixel computed as matrix products; shares its modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """What ``model`` makes of ``x`` [N, ...]."""
        with _Products():
            return self.model(x)


class _Products(TorchFunctionMode):
    """While it is active, calls of ``torch.conv2d`` go to ``conv2d`` below."""

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
    """``torch.conv2d``; a matrix product where [N, C, H, W] becomes [N, O, 1, 1]."""
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
    """The part of the image that the kernel covers, and the part of the kernel that covers it, in one dimension.

    () where the convolution makes several pixels, or one pixel of padding alone.
    """
    length = min(size, kernel - padding)
    if not 0 <= size + 2 * padding - kernel < stride or length < 1:
        return ()
    return slice(0, length), slice(padding, padding + length)


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values
