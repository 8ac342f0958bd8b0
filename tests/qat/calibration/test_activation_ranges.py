"""Calibration of a model: one pass, all methods, everything put back."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from qat.base.choices import Calibrator
from qat.base.errors import UserError
from qat.calibration.activation_ranges import calibrate_ranges, observe, set_ranges
from qat.fake_quantize.quantizer import ActivationQuantizer, WeightQuantizer

METHODS = get_args(Calibrator)


class Net(nn.Module):
    """A quantizer called twice, as where a concatenation shares a scale, one called once, one of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.twice, self.once = ActivationQuantizer(), ActivationQuantizer()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(5)))
        self.weight_quantizer = WeightQuantizer(axis=0)

    def forward(self, x: Tensor) -> Tensor:
        both = self.twice(x) + self.twice(-3 * x)
        hidden = self.norm(both) @ self.weight_quantizer(self.weight).T
        return self.once(torch.relu(hidden))


@pytest.fixture
def batches() -> list[Tensor]:
    return list(torch.randn(40, 8, generator=torch.Generator().manual_seed(6)).split(16))


class TestModel:
    def test_one_pass_gives_what_four_passes_give(self, batches: list[Tensor]):
        torch.manual_seed(0)
        model = Net()
        observers = observe(model, batches)
        for method in METHODS:
            assert set_ranges(model, observers, method, 99.0) == []
            from_one_pass = (model.twice.amax.clone(), model.once.amax.clone())
            assert calibrate_ranges(model, batches, method, 99.0) == []
            assert (model.twice.amax, model.once.amax) == from_one_pass

    def test_all_calls_of_a_quantizer_share_a_histogram(self, batches: list[Tensor]):
        model = Net()
        observers = observe(model, batches)
        assert observers["twice"].counts.sum() == 2 * 40 * 8
        calibrate_ranges(model, batches, "max")
        assert model.twice.amax == 3 * torch.cat(batches).abs().max()

    def test_it_observes_the_float_network_in_eval_mode(self, batches: list[Tensor]):
        model = Net()
        calibrate_ranges(model, batches, "max")
        x = torch.cat(batches)
        norm = (x - 3 * x) / math.sqrt(1 + model.norm.eps)  # the initial running mean and variance, 0 and 1
        torch.testing.assert_close(model.once.amax, (norm @ model.weight.T).relu().max().detach())
        assert model.norm.num_batches_tracked == 0

    @pytest.mark.parametrize("method", METHODS)
    def test_no_method_clips_above_the_exact_max(self, batches: list[Tensor], method: Calibrator):
        model = Net()
        observers = observe(model, batches)
        set_ranges(model, observers, method)
        assert 0 < model.twice.amax <= observers["twice"].amax
        assert model(batches[0]).isfinite().all()

    def test_an_all_zero_tensor_warns_and_its_scale_is_floored(self, batches: list[Tensor]):
        for method in METHODS:
            model = Net()
            nn.init.zeros_(model.weight)
            (warning,) = calibrate_ranges(model, batches, method)
            assert "once is zero" in warning
            assert model.once.amax == 0
            assert torch.equal(model(batches[0]), torch.zeros(16, 8))

    def test_a_tensor_that_no_batch_reaches_warns(self, batches: list[Tensor]):
        model = Net()
        model.auxiliary = ActivationQuantizer()
        (warning,) = calibrate_ranges(model, batches, "max")
        assert "auxiliary was not computed" in warning
        assert model.auxiliary.amax.isnan()

    def test_no_batch_is_a_users_mistake(self):
        with pytest.raises(UserError, match="no images"):
            calibrate_ranges(Net(), [], "max")

    def test_images_that_are_all_one_constant_are_refused(self):
        constant = torch.arange(8.0).expand(16, 8)
        with pytest.raises(UserError, match="all calibration images are the same constant"):
            calibrate_ranges(Net(), [constant, constant], "max")
        assert calibrate_ranges(Net(), [constant, constant + 1], "max") == []

    def test_an_unknown_method_lists_those_that_exist(self, batches: list[Tensor]):
        with pytest.raises(ValueError, match="choose max, percentile, mse or entropy"):
            calibrate_ranges(Net(), batches, "average")  # type: ignore[arg-type]

    def test_nan_names_the_tensor_and_every_mode_is_restored(self, batches: list[Tensor]):
        model = Net().train()
        model.norm.eval()
        model.extra = WeightQuantizer(axis=0)
        model.extra.enabled = False
        batches[1][0, 0] = math.nan
        with pytest.raises(UserError, match="tensor twice"):
            calibrate_ranges(model, batches, "entropy")
        assert model.training
        assert not model.norm.training
        assert model.weight_quantizer.enabled
        assert not model.extra.enabled
        assert model.twice.observer is None
        assert model.twice.training
        assert model.state_dict().keys() == Net().state_dict().keys()

    def test_progress_is_told_after_every_batch(self, batches: list[Tensor]):
        calls = []
        calibrate_ranges(Net(), iter(batches), "max", on_batch=lambda: calls.append(1))
        assert len(calls) == len(batches)

    def test_no_gradient_is_recorded(self, batches: list[Tensor]):
        model = Net()
        calibrate_ranges(model, batches, "mse")
        assert model.weight.grad is None
        assert not model.twice.amax.requires_grad
