"""The learning rate that suits a network, unless the user gives one."""

from __future__ import annotations

import pytest
import torch
import torchvision
from attention_forms import Attention
from torch import nn

from qat.graph.tracing import network_of, trace
from qat.options import TrainOptions


@pytest.mark.parametrize(
    ("model", "shape", "given", "rate"),
    [
        (Attention("fused"), (3, 64, 64), None, 5e-4),
        (Attention("module"), (3, 64, 64), 1e-2, 1e-2),
        (torchvision.models.squeezenet1_1(), (3, 64, 64), None, 2e-3),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Softmax(-1)), (3, 2, 2), None, 2e-3),
    ],
    ids=["attention", "given", "convolutions", "softmax"],
)
def test_networks_with_attention_learn_more_slowly(
    model: nn.Module, shape: tuple[int, ...], given: float | None, rate: float
) -> None:
    torch.manual_seed(0)
    recipe = TrainOptions(float_lr=given).float_recipe().suited_to(network_of(trace(model.eval(), shape)))
    assert recipe.lr == rate
    assert recipe.lr_at(0.3) == pytest.approx(rate, rel=0.01)  # the peak
