"""Checkpoints of pytorch-quantization: every amax arrives where it belongs, and what does not map is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from qat.base.errors import UserError
from qat.calibration.pytorch_quantization import match_ranges, set_imported_ranges, split_ranges
from qat.checkpoint import load_checkpoint
from qat.fake_quantize.prepare import activation_quantizers, prepare, weights_and_quantizers
from qat.fake_quantize.quantizer import weight_amax
from qat.options import TrainOptions
from qat.train import main as run


def old_checkpoint(model: nn.Module, shortcuts: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dict with buffers named as that library names them; every amax is another."""
    state, layers = dict(model.state_dict()), []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d)):
            layers.append(name)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            amax = weight_amax(module.weight, 0)
            state[f"{name}._weight_quantizer._amax"] = amax.reshape(-1, *[1] * (module.weight.ndim - 1))
    for index, name in enumerate(layers):
        state[f"{name}._input_quantizer._amax"] = torch.tensor(1.0 + index)
    for index, name in enumerate(shortcuts):
        state[f"{name}.residual_quantizer._amax"] = torch.tensor(100.0 + index)
    return state


def test_every_range_of_a_resnet_arrives() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    blocks = tuple(name for name, module in model.named_modules() if "BasicBlock" in type(module).__name__)
    state = old_checkpoint(model, blocks)
    state["maxpool._input_quantizer._amax"] = torch.tensor(7.0)
    state["layer1.0.conv2._weight_quantizer._amax"] = 0.5 * state["layer1.0.conv2._weight_quantizer._amax"]
    weights, ranges = split_ranges(state)
    assert weights.keys() == model.state_dict().keys()
    prepared = prepare(model, input_shape=(3, 64, 64))
    imported = set_imported_ranges(prepared, ranges)
    amax = {name: quantizer.amax.item() for name, quantizer in activation_quantizers(prepared).items()}
    assert amax["x"] == state["conv1._input_quantizer._amax"]
    assert amax["layer1_0_relu"] == state["layer1.0.conv2._input_quantizer._amax"]
    assert amax["maxpool"] == 100.0  # of the first block's shortcut, above that of its first convolution
    assert amax["layer2_0_downsample_1"] == 102.0
    assert amax["layer1_0_relu_1"] == 101.0
    assert amax["layer4_1_relu_1"] == state["avgpool._input_quantizer._amax"]
    assert amax["flatten"] == state["fc._input_quantizer._amax"]
    fixed = {name: module.weight_quantizer.amax for name, module in prepared.named_modules() if is_fixed(module)}
    assert list(fixed) == ["layer1.0.conv2"]
    assert torch.equal(fixed["layer1.0.conv2"], ranges["layer1.0.conv2._weight_quantizer"].flatten())
    assert imported.lines() == [
        f"{len(amax)} of {len(amax)} ranges of activations and 21 of 21 of weights are the checkpoint's",
        "1 in the checkpoint, but not used, because nothing is quantized there: maxpool._input_quantizer",
    ]
    assert list(imported.record()["from_checkpoint"]["tensors"]) == list(amax)


def is_fixed(module: nn.Module) -> bool:
    quantizer: Any = getattr(module, "weight_quantizer", None)
    return quantizer is not None and quantizer.amax is not None


def test_what_is_missing_is_named_and_keeps_its_range() -> None:
    model = torchvision.models.resnet18(num_classes=4)
    state = old_checkpoint(model)
    del state["avgpool._input_quantizer._amax"]
    state["fc._input_quantizer._amax"] = torch.ones(3)  # not per tensor
    prepared = prepare(model, input_shape=(3, 64, 64))
    imported = set_imported_ranges(prepared, split_ranges(state)[1])
    lacking = [name for name, quantizer in activation_quantizers(prepared).items() if quantizer.amax.isnan()]
    shortcuts = [f"layer{stage}_0_downsample_1" for stage in (2, 3, 4)]
    assert lacking == [*shortcuts, "layer4_1_relu_1", "flatten"]
    assert list(imported.other_tensors) == imported.record()["calibrated_here"]["tensors"] == lacking
    assert imported.lines()[1:] == [
        "not in the checkpoint, as the original does not quantize them, so calibrated here: "
        f"{', '.join(lacking[:4])} and 1 others",
        "1 in the checkpoint, but not used, because per channel, where we have one range per tensor: "
        "fc._input_quantizer",
    ]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_an_amax_that_is_no_range_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match=r"range of fc\._input_quantizer is negative, NaN or infinite"):
        split_ranges({"fc._input_quantizer._amax": torch.tensor(bad)})


def small_changes(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """``state`` with ranges of weights changed by ``factor``: training moved the weights, and the ranges stayed."""
    return {key: amax * factor if key.endswith("_weight_quantizer._amax") else amax for key, amax in state.items()}


@pytest.mark.parametrize("factor", [1 + 2e-4, 1 - 2e-4, 1 + 1e-6])
def test_ranges_of_weights_arrive_bit_by_bit(factor: float) -> None:
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=4)
    ranges = split_ranges(small_changes(old_checkpoint(model), factor))[1]
    prepared = prepare(model, input_shape=(3, 64, 64))
    set_imported_ranges(prepared, ranges)
    for path, weight, quantizer in weights_and_quantizers(prepared):
        amax = ranges[path.replace(".weight_quantizer", "._weight_quantizer")].flatten()
        assert torch.equal(quantizer.scale(weight), amax / 127)
        assert not torch.equal(amax, weight_amax(weight, 0))


def test_a_range_for_all_channels_and_one_along_another_axis() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    ranges = {"0._weight_quantizer": torch.tensor(3.0), "1._weight_quantizer": torch.ones(1, 16, 1, 1)}
    prepared = prepare(model, input_shape=(16, 8, 8))
    imported = set_imported_ranges(prepared, ranges)
    assert torch.equal(imported.weights["0.weight_quantizer"], torch.full((16,), 3.0))
    assert imported.other_weights == ("1.weight_quantizer",)
    assert imported.not_used == {"1._weight_quantizer": "of another shape than the weight's scales"}


def test_learned_ranges_count_and_not_those_they_began_with() -> None:
    state = {f"fc._input_quantizer.{name}": torch.tensor(value) for name, value in CLIP.items()}
    weights, ranges = split_ranges({"fc.weight": torch.ones(1), **state})
    assert (list(weights), ranges) == (["fc.weight"], {"fc._input_quantizer": torch.tensor(1.75)})
    state["fc._input_quantizer.clip.clip_value_min"] = torch.tensor(-2.5)
    assert split_ranges(state)[1] == {"fc._input_quantizer": torch.tensor(2.5)}
    del state["fc._input_quantizer.clip.clip_value_max"]
    with pytest.raises(UserError, match=r"fc\._input_quantizer in the weights has one end of a learned range only"):
        split_ranges(state)


CLIP = {"_amax": 9.0, "clip.clip_value_min": -1.5, "clip.clip_value_max": 1.75}


def test_scaled_inputs_are_refused() -> None:
    with pytest.raises(UserError, match=r"hold fc\._input_quantizer\._pre_quant_scale: that layer's input is"):
        split_ranges({"fc._input_quantizer._pre_quant_scale": torch.ones(4)})


@pytest.mark.parametrize("name", ["mobilenet_v2", pytest.param("vgg11", marks=pytest.mark.slow)])
def test_a_range_behind_a_dropout_arrives(name: str) -> None:
    model = torchvision.models.get_model(name, num_classes=4)
    state = old_checkpoint(model)
    prepared = prepare(model, input_shape=(3, 64, 64))
    imported = set_imported_ranges(prepared, split_ranges(state)[1])
    layers = {"mobilenet_v2": ["classifier.1"], "vgg11": ["classifier.0", "classifier.3", "classifier.6"]}[name]
    found = [amax.item() for amax in imported.tensors.values()]
    for layer in layers:
        assert state[f"{layer}._input_quantizer._amax"].item() in found
        assert f"{layer}._input_quantizer" not in imported.not_used


class Own(nn.Module):
    """A network in which a user placed quantizers: before an addition, and after a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 16, H - 2, W - 2]."""
        y = self.relu(self.a(x))
        return self.b(y) + y


def test_quantizers_of_the_user_are_ranges_of_the_tensors_they_name() -> None:
    values = {"relu_quantizer": 5.0, "_input0_quantizer": 6.0, "a._input_quantizer": 7.0, "gone.aq_quantizer": 8.0}
    state = {f"{key}._amax": torch.tensor(value) for key, value in values.items()}
    weights, ranges = split_ranges(Own().state_dict() | state)
    assert weights.keys() == Own().state_dict().keys()
    imported = match_ranges(prepare(Own(), input_shape=(3, 8, 8)), ranges)
    assert imported.tensors == {"x": torch.tensor(7.0), "relu": torch.tensor(5.0)}
    assert list(imported.not_used) == ["_input0_quantizer", "gone.aq_quantizer"]
    assert imported.lines()[-1] == (
        "2 in the checkpoint, but not used, because no tensor of this network has that name: "
        "_input0_quantizer, gone.aq_quantizer"
    )
    assert imported.lines()[1].startswith("not in the checkpoint, so calibrated here: a.weight_quantizer")


def test_a_run_takes_them_over(
    model: nn.Module, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = old_checkpoint(model)
    torch.save({"state_dict": state}, tmp_path / "old.pth")
    given = {"weights": str(tmp_path / "old.pth"), "output": tmp_path / "new.qat", "qat_epochs": 0}
    with pytest.raises(UserError, match="give --float-epochs 0"):
        run(TrainOptions(**tiny.options(trained, **given)))
    run(TrainOptions(**tiny.options(trained, **given, float_epochs=0)))
    assert "ranges of activations and 3 of 3 of weights are the checkpoint's" in capsys.readouterr().out
    saved = load_file(tmp_path / "new.qat")
    assert saved["activation_quantizers.relu.amax"] == state["conv2._input_quantizer._amax"]
    assert torch.equal(saved["conv1.weight"], state["conv1.weight"])
    loaded = load_checkpoint(tmp_path / "new.qat").model
    assert torch.equal(loaded.get_buffer("activation_quantizers.relu.amax"), saved["activation_quantizers.relu.amax"])
