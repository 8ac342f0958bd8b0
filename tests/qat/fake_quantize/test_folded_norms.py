"""Batch normalization behind a transposed convolution: folded before the weight, which has one scale, is quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from untrained import checkpoint_of, lively, prepared

from export.fold import fold
from export.lower import BatchNorm
from qat.checkpoint import load_checkpoint
from qat.fake_quantize.prepare import copy_for_evaluation, placement_of

X = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))


class Up(nn.Module):
    """A transposed convolution and its normalization; ``way`` says what stands against folding it."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(16, 24, 2, 2, bias=way == "bias")
        self.norm = nn.BatchNorm2d(24, track_running_stats=way != "no statistics")
        self.again = nn.ConvTranspose2d(16, 24, 2, 2, bias=False)
        if way == "tied":
            self.again.weight = self.up.weight
        self.head, self.way = nn.Conv2d(24, 16, 3), way

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        z = self.norm(y).relu()
        if self.way == "another reader":
            z = z + y.sigmoid()
        if self.way in ("called twice", "tied"):
            z = z + (self.again if self.way == "tied" else self.up)(x.flip(3)).sigmoid()
        answer: Tensor = self.head(z)
        return answer


@pytest.mark.parametrize("way", ["", "bias"])
def test_it_is_folded_into_the_float_weight_and_bias(way: str) -> None:
    model = lively(Up(way))
    norm = model.norm
    norm.running_mean.normal_(0, 0.5)
    norm.running_var.uniform_(0.5, 2)
    ready = prepared(model, (16, 4, 4))
    factor = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).detach().numpy()
    bias = 0 if model.up.bias is None else model.up.bias.detach().double().numpy()
    up = ready.get_submodule("up")
    want = model.up.weight.detach().double().numpy() * factor[:, None, None]
    np.testing.assert_allclose(up.weight.detach(), want, rtol=1e-6)
    want = norm.bias.detach().double().numpy() + (bias - norm.running_mean.double().numpy()) * factor
    np.testing.assert_allclose(up.bias.detach(), want, rtol=1e-5, atol=1e-6)
    assert up.weight.requires_grad
    assert up.bias.requires_grad
    assert not [key for key in ready.state_dict() if key.startswith("norm")]
    torch.testing.assert_close(copy_for_evaluation(ready, quantized=False)(X), model(X), rtol=1e-5, atol=1e-5)
    assert torch.equal(ready.train()(X), ready.eval()(X))  # nothing of it is left


@pytest.mark.parametrize("way", ["no statistics", "another reader", "called twice", "tied"])
def test_what_cannot_be_folded_stays_a_normalization_of_its_own(way: str) -> None:
    model = lively(Up(way))
    ready = prepared(model, (16, 4, 4))
    assert all(decision.quantized for decision in placement_of(ready).weights)
    assert ready.get_submodule("norm").weight is not None
    assert torch.equal(ready.get_submodule("up").weight, model.up.weight)
    folded, _ = fold(ready)
    assert way == "no statistics" or any(isinstance(module, BatchNorm) for module in folded.modules())
    torch.testing.assert_close(folded(X), ready(X), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_gives_the_float_network_with_the_folded_weights(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef net(num_classes):\n    torch.manual_seed(3)\n"
        "    up = nn.ConvTranspose2d(16, 16, 2, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU()\n"
        "    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes)\n"
        "    model = nn.Sequential(nn.Conv2d(3, 16, 3), *up, *head)\n"
        "    nn.init.uniform_(model[2].weight, 0.5, 1.5)\n    return model\n"
    )
    checkpoint = load_checkpoint(checkpoint_of(tmp_path, f"{tmp_path}/net.py:net"))
    with torch.no_grad():
        checkpoint.model.get_submodule("1").bias += 1  # as if trained
    network, x = checkpoint.float_network(), torch.randn(2, 3, 16, 16)
    assert network is not None
    torch.testing.assert_close(network(x), copy_for_evaluation(checkpoint.model, quantized=False)(x))
