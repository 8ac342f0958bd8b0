"""Zero channels: between which convolutions they are put, that they are zero, and that no answer changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from untrained import checkpoint_of, lively

from deploy import build
from export.fold import fold
from export.from_checkpoint import export_onnx
from export.pad_channels import CHANNELS, pad_channels
from export.session import session
from qat.base.artifact import read_sidecar
from qat.base.errors import UserError
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.quantizer import ActivationQuantizer


class Bottleneck(nn.Module):
    """stem -> relu -> [first 3x3 -> between -> second] + skip -> head; ``middle`` channels are between the two."""

    def __init__(
        self, middle: int = 64, kernel: int = 1, groups: tuple[int, int] = (1, 1), between: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.first = nn.Conv2d(32, middle, 3, padding=1, groups=groups[0], bias=False)
        self.norm = nn.BatchNorm2d(middle)
        self.between = between or nn.ReLU()
        self.second = nn.Conv2d(middle, 32, kernel, padding=kernel // 2, groups=groups[1])
        self.other = nn.Conv2d(middle, 32, 1)
        self.head = nn.Linear(32, 10)

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.norm(self.first(x)))) + x

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.block(self.stem(x).relu()))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def folded(model: nn.Module) -> fx.GraphModule:
    ready = prepare(lively(model), input_shape=(3, 16, 16))
    for module in ready.modules():
        if isinstance(module, ActivationQuantizer):
            module.amax.fill_(3.0)
    return fold(ready)[0]


@pytest.mark.parametrize(
    "between",
    [nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.LeakyReLU, lambda: nn.Sequential(nn.ReLU(), nn.Hardtanh(-0.5, 0.5))],
    ids=["relu", "relu6", "sigmoid", "leaky", "two"],
)
def test_the_channels_between_are_zero_and_the_answers_are_as_before(between):
    model = Bottleneck(between=between())
    plain, network = folded(model), folded(model)
    assert pad_channels(network) == ["second"]

    tensors, before = network.state_dict(), plain.state_dict()
    assert tensors["first.weight"].shape == (CHANNELS, 32, 3, 3)
    assert tensors["first.weight"].dtype == torch.int8
    assert tensors["second.weight"].shape == (32, CHANNELS, 1, 1)
    assert tensors["second.weight_quantizer.scale"].shape == (32,)
    for name in ("first.weight", "first.bias", "first.weight_quantizer.scale", "first.weight_quantizer.zero_point"):
        assert torch.equal(tensors[name][:64], before[name])
        assert (tensors[name][64:] == (1 if name.endswith("scale") else 0)).all()
    assert torch.equal(tensors["second.weight"][:, :64], before["second.weight"])
    assert not tensors["second.weight"][:, 64:].any()
    first, second = network.get_submodule("first"), network.get_submodule("second")
    assert (first.out_channels, second.in_channels) == (CHANNELS, CHANNELS)

    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(network(x), plain(x), rtol=1e-6, atol=1e-6)
    assert plain(x).std() > 0.05


@pytest.mark.slow
def test_the_last_convolutions_of_the_first_stage_of_resnet50():
    model = torchvision.models.resnet50(num_classes=10)
    plain, network = folded(model), folded(model)
    assert pad_channels(network) == ["layer1.0.conv3", "layer1.1.conv3", "layer1.2.conv3"]
    assert pad_channels(network) == []
    widths = {name: module.in_channels for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    assert min(width for name, width in widths.items() if name.endswith("conv3")) == CHANNELS
    x = torch.randn(1, 3, 64, 64)
    assert (network(x) - plain(x)).norm() < 1e-2 * plain(x).norm()  # another summation order may turn single codes


class Tapped(Bottleneck):
    """Another convolution reads what is between the two."""

    def block(self, x: Tensor) -> Tensor:
        y = self.between(self.norm(self.first(x)))
        return self.second(y) + x + self.other(y)


class NotAdded(Bottleneck):
    """No residual addition."""

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.norm(self.first(x))))


class Multiplied(Bottleneck):
    """A product in place of the sum."""

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.norm(self.first(x)))) * x


class Doubled(Bottleneck):
    """The sum is of the convolution's output alone."""

    def block(self, x: Tensor) -> Tensor:
        y = self.second(self.between(self.norm(self.first(x))))
        return y + y


class ReadTwice(Bottleneck):
    """The addition and something else read the convolution's output."""

    def block(self, x: Tensor) -> Tensor:
        y = self.second(self.between(self.norm(self.first(x))))
        return (y + x) * y.sigmoid()


class CalledTwice(Bottleneck):
    """Both convolutions work at two places, of which one is no residual block."""

    def block(self, x: Tensor) -> Tensor:
        y = self.second(self.between(self.first(x))) + x
        return self.second(self.between(self.first(y)))


class SlopeOfEachChannel(nn.Module):
    """PReLU as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(0, 1, 64))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.slope)


class ChannelSum(nn.Module):
    """Every channel becomes something of all of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.softmax(1)


class Transposed(Bottleneck):
    """The first convolution is a transposed one, whose output channels are another axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose2d(32, 64, 3, padding=1, bias=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bottleneck(middle=CHANNELS),
        lambda: Bottleneck(middle=2 * CHANNELS),
        lambda: Bottleneck(kernel=3),
        lambda: Bottleneck(groups=(1, 2)),
        lambda: Bottleneck(groups=(2, 1)),
        lambda: Bottleneck(between=nn.PReLU(64)),
        lambda: Bottleneck(between=SlopeOfEachChannel()),
        lambda: Bottleneck(between=nn.Softmax(1)),
        lambda: Bottleneck(between=ChannelSum()),
        lambda: Bottleneck(between=nn.MaxPool2d(3, 1, 1)),
        lambda: Bottleneck(between=nn.ChannelShuffle(4)),
        Tapped,
        NotAdded,
        Multiplied,
        Doubled,
        ReadTwice,
        CalledTwice,
        Transposed,
        torchvision.models.resnet18,
    ],
)
def test_where_they_do_not_belong(make):
    model = make()
    network, plain = folded(model), folded(model)
    assert pad_channels(network) == []
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in network.state_dict().items())


def test_a_float_convolution_has_no_codes_to_pad():
    ready = prepare(Bottleneck().eval(), input_shape=(3, 16, 16), keep_float=["first"])
    for module in ready.modules():
        if isinstance(module, ActivationQuantizer):
            module.amax.fill_(3.0)
    assert pad_channels(fold(ready)[0]) == []


# --- the command


def bottleneck(num_classes: int) -> nn.Module:
    return Bottleneck()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a bottleneck with random weights, whose test images are gone."""
    return checkpoint_of(tmp_path_factory.mktemp("padded"), f"{__file__}:bottleneck")


def test_the_padded_file_answers_as_the_plain_one_and_builds(untrained):
    plain = export_onnx(untrained)
    padded = export_onnx(untrained, pad_channels=True)
    paths = [untrained.with_suffix(suffix) for suffix in (".onnx", ".padded.onnx")]
    assert read_sidecar(paths[1], "onnx") == padded
    assert (plain.details["padded"], padded.details["padded"]) == ([], ["second"])
    found = {entry.key: entry.value for entry in onnx.load(paths[1]).metadata_props}
    assert json.loads(found["padded"]) == ["second"]
    assert (padded.figures["parity"]["worst_layer"]["sqnr_db"] or 999) > 100

    references = [np.load(untrained.with_suffix(f"{name}.reference.npz")) for name in ("", ".padded")]
    np.testing.assert_array_equal(*(reference["images"] for reference in references))
    np.testing.assert_allclose(*(reference["logits"] for reference in references), rtol=1e-6, atol=1e-6)
    x = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    answers = [session(path).run(None, {"input": x})[0] for path in paths]
    np.testing.assert_allclose(*answers, rtol=1e-6, atol=1e-6)

    assert build.main(build.BuildOptions(model=paths[1], builder="tensorrt-rtx", compute_capabilities=("8.9",))) == 0
    figures = read_sidecar(paths[1].with_suffix(".engine"), "engine").figures
    assert figures["convolutions_int8"] == figures["convolutions"] == 3


def test_a_network_without_such_a_place_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"no convolution of this network can be padded.*leave out --pad-channels"):
        export_onnx(checkpoint, pad_channels=True)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["model.qat", "model.qat.json"]


def test_input_and_weights_go_with_it(untrained, tmp_path):
    found: dict[str, Any] = {}
    for kind in ("int8-nchw", "uint8-nchw"):
        output = tmp_path / f"{kind}.onnx"
        found[kind] = export_onnx(untrained, output, input=kind, pad_channels=True, weights="float").details
    assert [(entry["input"], entry["weights"], entry["padded"]) for entry in found.values()] == [
        ("int8-nchw", "float", ["second"]),
        ("uint8-nchw", "float", ["second"]),
    ]
