"""Networks whose branches fewer layers could replace: the call is named, and only then."""

from __future__ import annotations

import pytest
import timm
import torchvision
from torch import Tensor, nn

import qat
from qat.graph.reparameterization import advice


class Branches(nn.Module):
    """Two convolutions that are added, and the one that RepVGG's own code makes of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(channels, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if hasattr(self, "one") else self.wide(x) + self.narrow(x)

    def switch_to_deploy(self) -> None:
        self.one = nn.Conv2d(self.wide.in_channels, 8, 3, padding=1)
        self.one.weight.data = self.wide.weight.data + nn.functional.pad(self.narrow.weight.data, (1, 1, 1, 1))
        del self.wide, self.narrow


class Refuses(Branches):
    def switch_to_deploy(self) -> None:
        raise RuntimeError("not yet")


def test_the_call_that_leaves_fewer_layers_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(Branches(16), nn.ReLU(), Branches(8))
    found = advice(model)
    assert found.startswith("2 convolutions and linear layers could compute what 4 do: call switch_to_deploy()")
    assert len(list(model.modules())) == 8, "the model is not changed"
    qat.prepare(model, input_shape=(16, 8, 8))
    assert "switch_to_deploy()" in capsys.readouterr().out


def test_timms_call_is_named() -> None:
    found = advice(timm.create_model("repvgg_a0"))  # 22 blocks of two convolutions and a classifier
    assert found.startswith("23 convolutions and linear layers could compute what 45 do")
    assert "timm.utils.reparameterize_model(model)" in found


@pytest.mark.parametrize("model", [Refuses(16), torchvision.models.resnet18(), timm.create_model("levit_128s")])
def test_a_network_without_a_faster_form_gets_no_advice(model: nn.Module) -> None:
    assert advice(model) == ""
