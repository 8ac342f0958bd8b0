"""Between which convolutions channels can be added."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from qat.graph.tracing import network_of, trace
from qat.rules.channel_regions import ChannelRegion, channel_region


class Chain(nn.Module):
    """first -> between -> second, and what ``also`` does with what is between."""

    def __init__(self, between: nn.Module, also: str = "") -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 16, 1, groups=2)
        self.fc = nn.Linear(16, 16)
        self.between, self.also = between, also

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.first(x))
        y = self.second(x)
        match self.also:
            case "added":
                return y + x
            case "grouped twice":
                return self.third(x) * self.third(y)
            case "read twice":
                return y * self.third(x)
            case "answered":
                return y, x
            case "linear":
                return y.mean((2, 3)) + self.fc(x.mean((2, 3)))
            case "shared":
                return self.second(y)
        return y


def region(model: nn.Module) -> ChannelRegion | None:
    return channel_region(network_of(trace(model.eval(), (3, 8, 8))), "first")


@pytest.mark.parametrize(
    "between", [nn.ReLU(), nn.Sequential(nn.BatchNorm2d(16), nn.SiLU()), nn.MaxPool2d(2), nn.Dropout(0.1)]
)
def test_a_region_reaches_from_convolutions_to_convolutions(between: nn.Module) -> None:
    found = region(Chain(between))
    assert found is not None
    assert (found.makers, found.takers) == ({"first"}, {"second"})
    assert "second" not in found.tensors


def test_all_readers_belong_to_it() -> None:
    found = region(Chain(nn.ReLU(), "read twice"))
    assert found is not None
    assert found.takers == {"second", "third"}


@pytest.mark.parametrize(
    "model",
    [
        Chain(nn.ReLU(), "added"),
        Chain(nn.ReLU(), "answered"),
        Chain(nn.ReLU(), "linear"),
        Chain(nn.ReLU(), "shared"),
        Chain(nn.ReLU(), "grouped twice"),
        Chain(nn.PixelUnshuffle(1)),
        Chain(nn.Softmax(1)),
        Chain(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(16))),
    ],
    ids=["sum", "output", "linear", "shared", "grouped", "moved", "softmax", "norm"],
)
def test_nothing_else_may_see_the_channels(model: nn.Module) -> None:
    assert region(model) is None
