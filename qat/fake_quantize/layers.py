"""Convolutions and linear layers with a fake-quantized weight; their parameters and state-dict keys do not change."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qat.fake_quantize.quantizer import WeightQuantizer


class _Convolution(nn.modules.conv._ConvNd):
    """Forward pass of convolutions: weight [O, I/groups, *kernel], one scale for each of the O channels."""

    weight_quantizer: WeightQuantizer

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, *space] -> [N, O, *space']."""
        return self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)


class QuantizedConv1d(_Convolution, nn.Conv1d):
    """``nn.Conv1d`` with a fake-quantized weight."""


class QuantizedConv2d(_Convolution, nn.Conv2d):
    """``nn.Conv2d`` with a fake-quantized weight."""


class QuantizedConv3d(_Convolution, nn.Conv3d):
    """``nn.Conv3d`` with a fake-quantized weight."""


class _TransposedConvolution(nn.modules.conv._ConvTransposeNd):
    """Forward pass of transposed convolutions: weight [I, O/groups, *kernel], one scale."""

    weight_quantizer: WeightQuantizer

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[N, I, *space] -> [N, O, *space']."""
        assert not isinstance(self.padding, str), "transposed convolutions take no named padding"
        dimensions = len(self.kernel_size)
        stride, kernel, dilation = list(self.stride), list(self.kernel_size), list(self.dilation)
        extra = self._output_padding(x, output_size, stride, list(self.padding), kernel, dimensions, dilation)
        weight = self.weight_quantizer(self.weight)
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
        return function(x, weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation)


class QuantizedConvTranspose1d(_TransposedConvolution, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a fake-quantized weight."""


class QuantizedConvTranspose2d(_TransposedConvolution, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a fake-quantized weight."""


class QuantizedConvTranspose3d(_TransposedConvolution, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a fake-quantized weight."""


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` with a fake-quantized weight [O, I], one scale for each of the O rows."""

    weight_quantizer: WeightQuantizer

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return F.linear(x, self.weight_quantizer(self.weight), self.bias)


_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Linear: QuantizedLinear,
}


def quantized_layer(module: nn.Module) -> nn.Module:
    """The fake-quantizing counterpart of ``module``; it shares the parameters."""
    twin = _QUANTIZED[type(module)](**_arguments(module), device="meta")
    twin.weight, twin.bias = module.weight, module.bias
    one_scale = isinstance(module, nn.modules.conv._ConvTransposeNd)
    twin.add_module("weight_quantizer", WeightQuantizer(axis=None if one_scale else 0))
    return twin.train(module.training)


def _arguments(module: nn.Module) -> dict[str, Any]:
    names = ["in_features", "out_features"]
    if isinstance(module, nn.modules.conv._ConvNd):
        names = [
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        ]
        if module.transposed:
            names.append("output_padding")
    return {name: getattr(module, name) for name in names} | {"bias": module.bias is not None}
