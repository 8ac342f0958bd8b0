"""Networks whose branches fewer layers could replace: the call is named, and only then."""

from __future__ import annotations

import pytest
import timm
import torchvision
from torch import Tensor, nn

import qat
from qat.graph.inputs import inputs_of
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
        self.one.bias.data = self.wide.bias.data + self.narrow.bias.data
        del self.wide, self.narrow


class Refuses(Branches):
    def switch_to_deploy(self) -> None:
        raise RuntimeError("not yet")


def test_the_call_that_leaves_fewer_layers_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(Branches(16), nn.ReLU(), Branches(8))
    found = advice(model, inputs_of(model, (16, 8, 8)))
    assert found.startswith("2 convolutions and linear layers could compute what 4 do: call switch_to_deploy()")
    assert len(list(model.modules())) == 8, "the model is not changed"
    qat.prepare(model, input_shape=(16, 8, 8))
    assert "switch_to_deploy()" in capsys.readouterr().out


def test_timms_call_is_named() -> None:
    model = timm.create_model("repvgg_a0")  # 22 blocks of two convolutions and a classifier
    found = advice(model, inputs_of(model, (3, 64, 64)))
    assert found.startswith("23 convolutions and linear layers could compute what 45 do")
    assert "timm.utils.reparameterize_model(model)" in found


class Drops(nn.Module):
    """Has a method of that name, which leaves out what training alone needs, and something else too."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.more = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.used(x), self.more(x)] if hasattr(self, "more") else [self.used(x)]

    def fuse(self) -> None:
        del self.more


class Changes(Branches):
    def switch_to_deploy(self) -> None:
        super().switch_to_deploy()
        self.one.bias.data.add_(1.0)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Refuses(16), (16, 8, 8)),
        (torchvision.models.resnet18(), (3, 64, 64)),
        (timm.create_model("levit_128s"), (3, 224, 224)),
        (nn.Sequential(Drops()), (16, 8, 8)),
        (Changes(16), (16, 8, 8)),
    ],
    ids=["refuses", "resnet18", "levit", "drops", "changes"],
)
def test_a_network_without_a_faster_form_gets_no_advice(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert advice(model, inputs_of(model, shape)) == ""
