"""Convolutions that make one pixel, as matrix products: values, gradients, and which convolutions they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.compute.device import Compute
from qat.compute.one_pixel import OnePixelProducts
from qat.fake_quantize.layers import quantized_layer

ONE_PIXEL = [  # height and width of the image, then the convolution
    ((1, 1), {"kernel_size": 1}),
    ((1, 1), {"kernel_size": 3, "padding": 1}),
    ((2, 2), {"kernel_size": 3, "padding": 1, "stride": 2}),
    ((2, 2), {"kernel_size": 1, "stride": 2, "bias": False}),
    ((5, 4), {"kernel_size": (5, 4)}),
    ((3, 4), {"kernel_size": (5, 3), "padding": (1, 0), "stride": (1, 2)}),
    ((1, 2), {"kernel_size": 7, "padding": 3, "stride": 4}),
    ((1, 1), {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 3}),
]
OTHERS = [
    ((2, 2), {"kernel_size": 3, "padding": 1}),
    ((1, 3), {"kernel_size": 3, "padding": 1, "stride": (1, 2)}),
    ((1, 1), {"kernel_size": 3, "padding": 1, "groups": 2}),
    ((3, 3), {"kernel_size": 2, "dilation": 2}),
    ((1, 1), {"kernel_size": 1, "padding": 2, "stride": 5}),  # of padding alone
    ((3, 3), {"kernel_size": 3, "padding": "same"}),
    ((3, 3), {"kernel_size": 3, "padding": "valid"}),
]


def gradients(layer: nn.Module, network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output of ``network`` and the gradients of its input and of ``layer``'s parameters, of a sum of squares."""
    x = x.clone().requires_grad_()
    output = network(x)
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
    return {"output": output, **dict(zip(["input", *names], found, strict=True))}


def is_convolution(output: Tensor) -> bool:
    """Whether the output was computed by a convolution."""
    assert output.grad_fn is not None
    return output.grad_fn.name() == "ConvolutionBackward0"


@pytest.mark.parametrize(("size", "options"), ONE_PIXEL)
def test_a_convolution_that_makes_one_pixel_becomes_a_product_of_the_same_values_and_gradients(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, **options).double()
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    expected, found = gradients(layer, layer, x), gradients(layer, OnePixelProducts(layer), x)
    assert expected["output"].shape == (3, 6, 1, 1)
    assert is_convolution(expected["output"])
    assert not is_convolution(found["output"])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "options"), OTHERS)
def test_any_other_convolution_stays_one(size: tuple[int, int], options: dict[str, Any]) -> None:
    layer = nn.Conv2d(4, 6, **options)
    x = torch.randn(3, 4, *size)
    output = OnePixelProducts(layer)(x)
    assert is_convolution(output)
    assert torch.equal(output, layer(x))


def test_one_image_without_a_batch_stays_a_convolution() -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(4, 1, 1)
    assert torch.equal(OnePixelProducts(layer)(x), layer(x))


def test_arguments_may_have_names() -> None:
    class Layer(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, weight=self.weight, bias=self.bias, padding=1)

    layer, x = Layer(4, 6, 3), torch.randn(3, 4, 1, 1)
    output = OnePixelProducts(layer)(x)
    assert not is_convolution(output)
    torch.testing.assert_close(output, layer(x))


def test_training_on_a_cpu_computes_so_with_quantizers_too() -> None:
    layer = quantized_layer(nn.Conv2d(4, 6, 3, padding=1))
    forward, x = Compute(torch.device("cpu")).forward(layer, images=3, steps=0), torch.randn(3, 4, 1, 1)
    assert not is_convolution(forward(x))
    torch.testing.assert_close(gradients(layer, forward, x), gradients(layer, layer, x))
