"""Merged shortcuts: which blocks have one, which codes stay, how far weights move, and what the command says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from untrained import checkpoint_of, lively

from deploy import build
from export.emit import emit
from export.fold import fold
from export.from_checkpoint import export_onnx
from export.linter import lint_model
from export.merge_shortcuts import merge_shortcuts
from export.pad_channels import CHANNELS, pad_channels
from export.session import session, sqnr_db
from qat.base.artifact import read_sidecar
from qat.base.errors import UserError
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import prepare
from qat.fake_quantize.quantizer import SCALE_FLOOR

PIXELS = 8


class Block(nn.Module):
    """stem -> relu -> [first 3x3 -> relu -> last] + shortcut -> relu -> head."""

    def __init__(
        self, stride: int = 1, *, of_first: int = 1, wide: int = 32, middle: int = 32, **of_the_shortcut: Any
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, wide, 3, padding=1)
        self.first = nn.Conv2d(wide, middle, 3, stride, padding=1, groups=of_first, bias=False)
        self.norm = nn.BatchNorm2d(middle)
        self.last = nn.Conv2d(middle, 48, 1)
        self.shortcut = nn.Conv2d(wide, 48, **{"kernel_size": 1, "stride": stride} | of_the_shortcut)
        self.other = nn.Conv2d(middle, 48, 1)
        self.head = nn.Linear(48, 10)

    def inner(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x)).relu()

    def block(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)) + self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.block(self.stem(x).relu()))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1))


def folded(model: nn.Module, x: Tensor | None = None) -> fx.GraphModule:
    x = images() if x is None else x
    ready = prepare(lively(model), input_shape=x.shape[1:])
    calibrate_ranges(ready, [x], "max")
    return fold(ready)[0]


def dequantized(network: fx.GraphModule, name: str) -> Tensor:
    layer: Any = network.get_submodule(name)
    return layer.weight * layer.weight_quantizer.scale[:, None, None, None]


def source_scale(network: fx.GraphModule, name: str) -> Tensor:
    """The scale of the quantizer that the layer ``name`` reads."""
    (node,) = [node for node in network.graph.nodes if node.target == name]
    return network.get_submodule(str(node.args[0].target)).scale


def outputs(network: fx.GraphModule, name: str, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda module, inputs, output: found.append(output))
    network(x)
    handle.remove()
    return found[0]


class Swapped(Block):
    """The shortcut is the sum's first operand."""

    def block(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.last(self.inner(x))


class NoReLU(Block):
    """Nothing between the first convolution and the last."""

    def inner(self, x: Tensor) -> Tensor:
        return self.first(x)


class LongShortcut(Block):
    """Both branches are as long, so that placement quantizes the output of the last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(32, 32, 3, padding=1)

    def block(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)) + self.shortcut(self.before(x).relu())


class Sizes(Block):
    """A sum of sizes stands beside that of tensors."""

    def block(self, x: Tensor) -> Tensor:
        y = super().block(x)
        return y.reshape(-1, y.size(1), y.size(2) + x.size(3) - x.size(3), y.size(3))


@pytest.mark.parametrize(
    "make",
    [
        Block,
        Swapped,
        NoReLU,
        LongShortcut,
        Sizes,
        lambda: Block(stride=2),
        lambda: Block(of_first=4),
        lambda: Block(bias=False),
        lambda: Block(padding="same"),
        lambda: Block(dilation=2),
    ],
)
def test_codes_stay_and_weights_are_off_by_half_a_step(make):
    model = make()
    plain, network = folded(model), folded(model)
    assert merge_shortcuts(network) == ["last"]
    assert "shortcut" not in dict(network.named_modules())
    x = images()
    factor = source_scale(plain, "shortcut") / source_scale(plain, "last")
    torch.testing.assert_close(outputs(network, "first", x), outputs(plain, "first", x) * factor, rtol=1e-5, atol=1e-5)
    assert torch.equal(network.get_submodule("first").weight, plain.get_submodule("first").weight)

    last: Any = network.get_submodule("last")
    assert (last.in_channels, last.weight.dtype, last.weight.abs().max()) == (64, torch.int8, 127)
    expected = torch.cat((dequantized(plain, "last") / factor, dequantized(plain, "shortcut")), 1)
    step = last.weight_quantizer.scale[:, None, None, None]
    assert ((dequantized(network, "last") - expected).abs() <= step * 0.5001).all()
    torch.testing.assert_close(step.flatten(), expected.abs().amax((1, 2, 3)) / 127)
    bias = plain.get_submodule("last").bias + plain.get_submodule("shortcut").bias
    torch.testing.assert_close(last.bias, bias)
    assert (sqnr_db(plain(x).numpy(), network(x).numpy()) or 999) > 25


@pytest.mark.parametrize("stride", [1, 2])
def test_the_file_is_clean_and_onnx_runtime_computes_the_same(stride, tmp_path):
    network = folded(Block(stride))
    merge_shortcuts(network)
    exported = emit(network, images(2), {})
    assert lint_model(exported) == []
    counts = [sum(node.op_type == name for node in exported.graph) for name in ("Conv", "Concat", "MaxPool", "Add")]
    assert counts == [3, 1, stride - 1, 0]
    ir.save(exported, tmp_path / "m.onnx")
    (found,) = session(tmp_path / "m.onnx").run(None, {"input": images().numpy()})
    np.testing.assert_allclose(found, network(images()).numpy(), rtol=1e-5, atol=1e-5)
    options = build.BuildOptions(model=tmp_path / "m.onnx", builder="tensorrt-rtx", compute_capabilities=("8.9",))
    assert build.main(options) == 0
    figures = read_sidecar(tmp_path / "m.engine", "engine").figures
    assert figures["convolutions_int8"] == figures["convolutions"] == 3


@pytest.mark.slow
def test_the_stages_of_resnet50():
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model = torchvision.models.resnet50(num_classes=10)
    plain, network = folded(model, x), folded(model, x)
    assert merge_shortcuts(network) == [f"layer{stage}.0.conv3" for stage in (1, 2, 3, 4)]
    assert merge_shortcuts(network) == []
    assert pad_channels(network) == ["layer1.1.conv3", "layer1.2.conv3"]
    assert network.get_submodule("layer1.0.conv3").in_channels == CHANNELS
    assert (network(x) - plain(x)).norm() < 0.2 * plain(x).norm()


class Tapped(Block):
    """Another convolution reads what is between the two."""

    def block(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.last(y) + self.shortcut(x) + self.other(y)


class ReadTwice(Block):
    """The sum and something else read the shortcut."""

    def block(self, x: Tensor) -> Tensor:
        y = self.shortcut(x)
        return (self.last(self.inner(x)) + y) * y.sigmoid()


class Multiplied(Block):
    """A product in place of the sum."""

    def block(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)) * self.shortcut(x)


class Weighted(Block):
    """A sum with a factor."""

    def block(self, x: Tensor) -> Tensor:
        return torch.add(self.last(self.inner(x)), self.shortcut(x), alpha=2)


class Clipped(Block):
    """An activation that is not the same at another scale."""

    def inner(self, x: Tensor) -> Tensor:
        return F.relu6(self.norm(self.first(x)))


class Identity(Block):
    """No projection."""

    def __init__(self) -> None:
        super().__init__(wide=48)

    def block(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)) + x


class OneInput(Block):
    """Both read the same tensor."""

    def block(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.last(y) + self.other(y)


class CalledTwice(Block):
    """The shortcut works at two places."""

    def block(self, x: Tensor) -> Tensor:
        return (self.last(self.inner(x)) + self.shortcut(x)).relu() + self.shortcut(x.relu() * 2)


class OfTheInput(Block):
    """The shortcut reads the network's input, whose codes may be the caller's."""

    def __init__(self) -> None:
        super().__init__(wide=32)
        self.stem = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.block(x).relu(), 1).flatten(1))


class GroupedLast(Block):
    """The last convolution has groups."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(32, 48, 1, groups=2)


class StridedLast(Block):
    """Both skip pixels."""

    def __init__(self) -> None:
        super().__init__(stride=2)
        self.first = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.last = nn.Conv2d(32, 48, 1, 2)


class Padded(Block):
    """Both put a border around the image."""

    def __init__(self) -> None:
        super().__init__(padding=1)
        self.last = nn.Conv2d(32, 48, 1, padding=1)


class FeedsAnother(Block):
    """Another convolution reads the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Conv2d(48, 48, 3, padding=1)

    def block(self, x: Tensor) -> Tensor:
        y = self.shortcut(x)
        return (self.last(self.inner(x)) + y) * self.more(y)


class FloatReader(Block):
    """Something in float reads what is between the two."""

    def block(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.last(y) + self.shortcut(x) + y.sum(1, True)


class OnePixel(Block):
    """The sum is of all pixels with one."""

    def block(self, x: Tensor) -> Tensor:
        return self.last(self.inner(F.adaptive_avg_pool2d(x, 1))) + self.shortcut(x)


class OnePixelShortcut(Block):
    """The shortcut has one pixel."""

    def block(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)) + self.shortcut(F.adaptive_avg_pool2d(x, 1))


class OneChannel(Block):
    """The sum is of all channels with one."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(32, 1, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Block(kernel_size=3, padding=1),
        lambda: Block(groups=2),
        lambda: Block(wide=48),
        lambda: Block(middle=48),
        GroupedLast,
        StridedLast,
        Padded,
        FeedsAnother,
        FloatReader,
        OnePixel,
        OnePixelShortcut,
        OneChannel,
        Tapped,
        ReadTwice,
        Multiplied,
        Weighted,
        Clipped,
        Identity,
        OneInput,
        CalledTwice,
        torchvision.models.resnet18,
    ],
)
def test_where_there_is_nothing_to_merge(make):
    model = make()
    x = torch.randn(2, 3, 32, 32)
    network, plain = folded(model, x), folded(model, x)
    assert merge_shortcuts(network) == []
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in network.state_dict().items())
    assert torch.equal(network(x), plain(x))


def test_a_shortcut_of_the_input_stays():
    assert merge_shortcuts(folded(OfTheInput(), torch.randn(2, 32, PIXELS, PIXELS))) == []


def test_a_float_convolution_is_not_merged():
    ready = prepare(Block().eval(), input_shape=(3, PIXELS, PIXELS), keep_float=["shortcut"])
    calibrate_ranges(ready, [images()], "max")
    assert merge_shortcuts(fold(ready)[0]) == []


def test_the_scale_of_a_dead_channel_stays_at_the_floor():
    model = Block()
    network = folded(model)
    with torch.no_grad():
        first: Any = network.get_submodule("first")
        first.weight[3] = 0
        first.weight_quantizer.scale[3] = SCALE_FLOOR
    plain = copy.deepcopy(network)
    for node in network.graph.nodes:  # a coarse scale inside makes the factor small
        if node.target == "last":
            network.get_submodule(str(node.args[0].target)).scale.mul_(1e4)
    assert merge_shortcuts(network) == ["last"]
    assert first.weight_quantizer.scale[3] == SCALE_FLOOR
    assert 0 < first.weight_quantizer.scale[2] < 0.1 * plain.get_submodule("first").weight_quantizer.scale[2]


# --- the command


class Network(Block):
    """A block with a shortcut, with dead channels, and one that zero channels fit into."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(48, 64, 3, padding=1), nn.Conv2d(64, 48, 1)
        with torch.no_grad():
            self.shortcut.weight[:2] = 0
            self.last.weight[0] = 0

    def block(self, x: Tensor) -> Tensor:
        x = super().block(x).relu()
        return x + self.up(self.down(x).relu())


def network(num_classes: int) -> nn.Module:
    return Network()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a block with random weights, whose test images are gone."""
    return checkpoint_of(tmp_path_factory.mktemp("merged"), f"{__file__}:network")


def test_the_command_says_what_was_merged_and_what_it_changed(untrained, capsys):
    plain = export_onnx(untrained)
    merged = export_onnx(untrained, merge_shortcuts=True)
    path = untrained.with_suffix(".merged.onnx")
    assert read_sidecar(path, "onnx") == merged
    assert (plain.details["merged"], merged.details["merged"]) == ([], ["last"])
    dead = [[(one["layer"], one["channel"]) for one in sidecar.details["dead_channels"]] for sidecar in (plain, merged)]
    assert dead == [[("last", 0), ("shortcut", 0), ("shortcut", 1)], [("last", 0)]]
    assert "merging" not in plain.figures
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(found["merged"]) == ["last"]
    assert (merged.figures["parity"]["worst_layer"]["sqnr_db"] or 999) > 100

    references = [np.load(untrained.with_suffix(f"{name}.reference.npz")) for name in ("", ".merged")]
    np.testing.assert_array_equal(*(reference["images"] for reference in references))
    before, after = (reference["logits"] for reference in references)
    other = int((before.argmax(1) != after.argmax(1)).sum())
    decibels = sqnr_db(before, after)
    assert merged.figures["merging"] == {"images": len(before), "other_top1": other, "sqnr_db": decibels}
    said = f"merged against trained: {other} of {len(before)} images with another top-1, logits at {decibels:.1f} dB"
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "kind", ["uint8-nchw", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("float32-nchw", "int8-nchw"))]
)
def test_it_goes_with_zero_channels_float_weights_and_every_input(untrained, tmp_path, kind):
    output = tmp_path / "m.onnx" if kind != "float32-nchw" else None
    merged = export_onnx(untrained, output, input=kind, merge_shortcuts=True, weights="float")
    both = export_onnx(untrained, output, input=kind, merge_shortcuts=True, weights="float", pad_channels=True)
    assert (both.details["input"], both.details["weights"]) == (kind, "float")
    assert (both.details["merged"], both.details["padded"]) == (["last"], ["up"])
    assert (both.figures["parity"]["worst_layer"]["sqnr_db"] or 999) > 100
    path = output or untrained.with_suffix(".merged-padded-float-weights.onnx")
    assert read_sidecar(path, "onnx") == both
    assert both.figures["merging"]["sqnr_db"] == pytest.approx(merged.figures["merging"]["sqnr_db"], abs=0.1)


def test_a_network_without_such_a_shortcut_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"no shortcut of this network can be merged, .* multiples of 32: leave out"):
        export_onnx(checkpoint, merge_shortcuts=True)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["model.qat", "model.qat.json"]
