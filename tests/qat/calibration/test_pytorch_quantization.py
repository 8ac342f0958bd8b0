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
from qat.calibration.pytorch_quantization import set_imported_ranges, split_ranges
from qat.checkpoint import load_checkpoint
from qat.fake_quantize.prepare import activation_quantizers, prepare
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
    lines = set_imported_ranges(prepared, ranges)
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
    assert torch.equal(fixed["layer1.0.conv2"], ranges["layer1.0.conv2._weight_quantizer._amax"].flatten())
    assert lines == [
        f"ranges of {len(amax)} of {len(amax)} tensors and 21 weights come from the checkpoint",
        "in the checkpoint, but not used, because nothing is quantized there: maxpool._input_quantizer._amax",
    ]


def is_fixed(module: nn.Module) -> bool:
    quantizer: Any = getattr(module, "weight_quantizer", None)
    return quantizer is not None and quantizer.amax is not None


def test_what_is_missing_is_named_and_keeps_its_range() -> None:
    model = torchvision.models.resnet18(num_classes=4)
    state = old_checkpoint(model)
    del state["avgpool._input_quantizer._amax"]
    state["fc._input_quantizer._amax"] = torch.ones(3)  # not per tensor
    prepared = prepare(model, input_shape=(3, 64, 64))
    lines = set_imported_ranges(prepared, split_ranges(state)[1])
    lacking = [name for name, quantizer in activation_quantizers(prepared).items() if quantizer.amax.isnan()]
    shortcuts = [f"layer{stage}_0_downsample_1" for stage in (2, 3, 4)]
    assert lacking == [*shortcuts, "layer4_1_relu_1", "flatten"]
    assert lines[1] == f"not in the checkpoint, so calibrated here: {', '.join(lacking)}"
    assert lines[2].endswith("quantized there: fc._input_quantizer._amax")


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_an_amax_that_is_no_range_is_refused(bad: float) -> None:
    with pytest.raises(UserError, match=r"fc\._input_quantizer\._amax in the weights is negative, NaN or infinite"):
        split_ranges({"fc._input_quantizer._amax": torch.tensor(bad)})


def test_a_run_takes_them_over(
    model: nn.Module, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = old_checkpoint(model)
    torch.save({"state_dict": state}, tmp_path / "old.pth")
    given = {"weights": str(tmp_path / "old.pth"), "output": tmp_path / "new.qat", "qat_epochs": 0}
    with pytest.raises(UserError, match="give --float-epochs 0"):
        run(TrainOptions(**tiny.options(trained, **given)))
    run(TrainOptions(**tiny.options(trained, **given, float_epochs=0)))
    assert "tensors and 3 weights come from the checkpoint" in capsys.readouterr().out
    saved = load_file(tmp_path / "new.qat")
    assert saved["activation_quantizers.relu.amax"] == state["conv2._input_quantizer._amax"]
    assert torch.equal(saved["conv1.weight"], state["conv1.weight"])
    loaded = load_checkpoint(tmp_path / "new.qat").model
    assert torch.equal(loaded.get_buffer("activation_quantizers.relu.amax"), saved["activation_quantizers.relu.amax"])
