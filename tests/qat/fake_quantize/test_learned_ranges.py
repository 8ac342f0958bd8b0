"""Learned step sizes and weight ranges of the least error: gradients by hand, a run, and the exported codes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from export.fold import fold
from qat.base.artifact import read_sidecar
from qat.calibration.activation_ranges import calibrate_ranges
from qat.checkpoint import load_checkpoint
from qat.fake_quantize.prepare import activation_quantizers, prepare, weights_and_quantizers
from qat.fake_quantize.quantizer import (
    ACTIVATION,
    WEIGHT,
    WeightQuantizer,
    fake_quantize,
    learned_fake_quantize,
    weight_amax,
)
from qat.fake_quantize.weight_ranges import learn_ranges, weight_amax_mse
from qat.options import TrainOptions
from qat.train import main as run


def test_the_gradient_of_a_learned_scale_by_hand() -> None:
    """Esser et al. 2020, equations 3 and section 2.2: clipped values pull the scale by the code, others by rounding."""
    x = torch.tensor([0.30, -0.26, 12.0, -13.0], requires_grad=True)  # at scale 0.1: 3.0, -2.6, 120, -130
    scale = torch.tensor(0.1, requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 3.0, 5.0])
    learned_fake_quantize(x, scale * 1.0).backward(grad)
    rounding = [3 - 3.0, -3 + 2.6, 120 - 120.0, -128.0]
    expected = sum(g * r for g, r in zip(grad.tolist(), rounding, strict=True)) / math.sqrt(4 * 127)
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(expected, rel=1e-4)
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 0.0]


def test_the_gradient_per_channel_is_that_of_each_channel_alone() -> None:
    torch.manual_seed(0)
    weight, scale = torch.randn(4, 3, 3, 3), torch.rand(4, 1, 1, 1) / 100 + 0.005
    grad = torch.randn_like(weight)
    whole = scale.clone().requires_grad_()
    learned_fake_quantize(weight, whole, WEIGHT).backward(grad)
    for channel in range(4):
        one = scale[channel].clone().requires_grad_()
        learned_fake_quantize(weight[channel], one, WEIGHT).backward(grad[channel])
        assert whole.grad is not None
        torch.testing.assert_close(whole.grad[channel], one.grad)


def test_learned_and_fixed_ranges_give_the_same_values() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(100), torch.tensor(0.01)
    for codes in (ACTIVATION, WEIGHT):
        assert torch.equal(learned_fake_quantize(x, scale, codes), fake_quantize(x, scale, codes))
    quantizer, weight = WeightQuantizer(0), torch.randn(4, 8)
    quantizer.fix(torch.full((4,), 0.5))
    fixed = quantizer(weight)
    assert fixed.abs().max() == pytest.approx(0.5)  # larger weights are clamped
    quantizer.learn()
    assert torch.equal(quantizer(weight), fixed)
    assert set(dict(quantizer.named_parameters())) == {"amax"}


@pytest.mark.parametrize("axis", [0, 1, None])
def test_the_range_of_the_least_error_against_a_search_by_numpy(axis: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 256, 256, generator=generator)  # so many that the largest are worth clipping
    found = weight_amax_mse(weight, axis)
    count = 1 if axis is None else weight.shape[axis]
    rows = np.moveaxis(weight.numpy().astype(np.float64), axis or 0, 0).reshape(count, -1)
    for row, amax in zip(rows, found.reshape(-1).tolist(), strict=True):

        def error(candidate: float, row: np.ndarray = row) -> float:
            scale = candidate / 127
            return float(((np.clip(np.rint(row / scale), -127, 127) * scale - row) ** 2).mean())

        tried = [np.abs(row).max() * step / 100 for step in range(1, 101)]
        assert error(amax) == pytest.approx(min(map(error, tried)), rel=1e-4)
    assert (found < weight_amax(weight, axis)).all()


def test_a_channel_of_zeros_has_the_range_zero() -> None:
    weight = torch.randn(2, 8)
    weight[1] = 0
    assert weight_amax_mse(weight, 0)[1] == 0


class Functional(nn.Module):
    """A convolution by a function on a bare parameter, and one that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(F.conv2d(x, self.kernel, padding=1)))


def test_exported_codes_are_those_of_the_learned_ranges() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    prepared = prepare(Functional().eval(), input_shape=(3, 8, 8))
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
    learn_ranges(prepared)
    assert len(list(weights_and_quantizers(prepared))) == 2
    with torch.no_grad():
        for _, _, quantizer in weights_and_quantizers(prepared):
            assert quantizer.amax is not None
            quantizer.amax.mul_(0.6)
        for activation in activation_quantizers(prepared).values():
            activation.amax.mul_(0.8)
        torch.testing.assert_close(fold(prepared)[0](x), prepared(x), rtol=1e-4, atol=1e-5)


def train(folder: Path, output: Path, learn_ranges: bool = True, **changes: Any) -> dict[str, Tensor]:
    options = tiny.options(folder, output=output, learn_ranges=learn_ranges, **changes)
    run(TrainOptions(**options))
    return load_file(output)


def test_a_run_learns_ranges_and_its_checkpoint_keeps_them(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(trained, tmp_path / "whole.qat")
    frozen = train(trained, tmp_path / "frozen.qat", ranges_lr=0.0)
    for name in ("conv2.weight_quantizer.amax", "activation_quantizers.relu.amax"):
        assert not torch.equal(whole[name], frozen[name])
    assert (
        frozen["activation_quantizers.relu.amax"] == load_file(trained / "model.qat")["activation_quantizers.relu.amax"]
    )
    loaded = load_checkpoint(tmp_path / "whole.qat").model
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, whole[name])
    codes = fold(loaded)[0].get_submodule("fc").weight
    amax = whole["fc.weight_quantizer.amax"]
    expected = (whole["fc.weight"] / (amax / 127)[:, None]).round().clamp(-127, 127)
    assert torch.equal(codes.float(), expected)
    assert read_sidecar(tmp_path / "whole.qat", "checkpoint").details["recipes"]["qat"]["ranges_lr"] == 10.0
    tiny.stop_in_steps(monkeypatch, lambda step: step == tiny.FLOAT_STEPS + 5)
    with pytest.raises(tiny.Stopped):
        train(trained, tmp_path / "model.qat", save_seconds=0)
    stopped = train(trained, tmp_path / "model.qat", save_seconds=0, resume=True)
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []


def test_ranges_of_weights_are_fixed_where_the_error_is_least_on_request(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"learn_ranges": False, "weight_calibrator": "mse"}
    untrained = train(trained, tmp_path / "untrained.qat", qat_epochs=0, **changes)
    expected = weight_amax_mse(untrained["conv2.weight"], 0)
    assert (expected < untrained["conv2.weight"].abs().amax((1, 2, 3))).any()
    assert torch.equal(untrained["conv2.weight_quantizer.amax"], expected)
    whole = train(trained, tmp_path / "whole.qat", **changes)
    assert torch.equal(whole["conv2.weight_quantizer.amax"], expected)  # also after training
    assert not torch.equal(whole["conv2.weight"], untrained["conv2.weight"])
    assert read_sidecar(tmp_path / "whole.qat", "checkpoint").details["weight_calibrator"] == "mse"
    tiny.stop_in_steps(monkeypatch, lambda step: step == tiny.FLOAT_STEPS + 5)
    with pytest.raises(tiny.Stopped):
        train(trained, tmp_path / "model.qat", save_seconds=0, **changes)
    stopped = train(trained, tmp_path / "model.qat", save_seconds=0, resume=True, **changes)
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []
