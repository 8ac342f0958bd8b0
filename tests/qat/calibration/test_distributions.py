"""What calibration saw, for the report: the same numbers as qat.calibration.explain, and those of the weights."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from explanations import KINDS, explained, samples
from own_network import Net
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat.base.errors import UserError
from qat.base.number_format import low_bit_format
from qat.base.ranges_file import Distributions, read_distributions, write_distributions
from qat.calibration.activation_ranges import observe, set_ranges
from qat.calibration.distributions import _activation, distributions
from qat.calibration.explain import explain_calibration
from qat.calibration.settings import CalibrationSettings
from qat.fake_quantize.prepare import activation_quantizers, placement_of, prepare
from qat.graph.tracing import network_of

SHAPE = (3, 16, 16)


@pytest.fixture
def batches() -> list[Tensor]:
    return list(torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(2)).split(4))


def calibrated(model: nn.Module, batches: list[Tensor]) -> tuple[fx.GraphModule, Distributions]:
    prepared = prepare(model, input_shape=SHAPE)
    observers = observe(prepared, batches)
    set_ranges(prepared, observers, "entropy")
    return prepared, distributions(prepared, observers, CalibrationSettings("entropy", 99.9), 8)


def test_they_agree_with_the_explanations(batches: list[Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared, found = calibrated(Net(), batches)
    assert (found.checkpoint, found.calibrator, found.percentile, found.images) == ("", "entropy", 99.9, 8)
    told = explain_calibration(prepared, batches, percentile=99.9)
    assert [one.quantizer for one in found.activations] == [one.name for one in told]
    shapes = {op.name: op.shape for op in network_of(prepared)}
    for one, explanation in zip(found.activations, told, strict=True):
        assert one.tensors == explanation.tensors
        values = sum(8 * math.prod((shapes[tensor] or ())[1:]) for tensor in one.tensors)
        assert sum(one.counts) == values
        np.testing.assert_array_equal(one.counts, np.reshape(explanation.counts, (128, 16)).sum(1))
        amax = activation_quantizers(prepared)[one.quantizer].amax.item()
        assert (one.limit, one.largest, one.amax) == pytest.approx((explanation.limit, explanation.largest, amax), 1e-4)
        assert one.largest == float(f"{explanation.largest:.5g}")
        for choice, expected in zip(one.choices, explanation.choices, strict=True):
            assert choice.method == expected.method
            assert choice.amax == pytest.approx(expected.amax, 1e-4)
            assert choice.clipped == pytest.approx(expected.clipped, 1e-4)
            assert choice.sqnr_db == pytest.approx(expected.sqnr_db, 1e-4)
        chosen = {choice.method: choice.amax for choice in one.choices}
        assert one.amax == chosen["entropy"]
        assert one.problem == ""
    write_distributions(tmp_path / "m.ranges.json", found)
    with pytest.raises(UserError, match="has not ended"):
        read_distributions(tmp_path / "m.ranges.json", "")


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_has_few_candidates_and_the_chosen_one_is_among_them(kind: str) -> None:
    number_format = low_bit_format(4, signed=False)
    explanation = explained(samples(kind), number_format)
    found, curve = _activation(explanation, math.nan).kl, explanation.kl
    assert found is not None
    assert curve is not None
    assert len(found.amax) == len(found.cost) <= 64
    assert list(found.amax) == sorted(found.amax)
    ends = (curve.amax[0], curve.amax[-1], curve.amax[curve.best])
    assert {float(f"{amax:.5g}") for amax in ends} <= set(found.amax)
    costs = [cost for cost in found.cost if cost is not None]
    assert min(costs) == pytest.approx(curve.cost[curve.best], rel=1e-4)
    assert all(math.isfinite(cost) for cost in costs)


def test_a_tensor_of_zeros_and_one_that_was_not_reached() -> None:
    dead, absent = (_activation(explained(x), math.nan) for x in (torch.zeros(7), None))
    assert (dead.kl, dead.largest, dead.amax, sum(dead.counts)) == (None, 0.0, None, 7)
    assert "zero for every calibration image" in dead.problem
    assert (absent.kl, absent.largest, absent.choices, sum(absent.counts)) == (None, None, (), 0)
    assert "not computed" in absent.problem


class Weights(nn.Module):
    """Weights of every layout, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.down = nn.Parameter(torch.randn(8, 6, 2, 2))
        self.matrix, self.fc = nn.Parameter(torch.randn(8, 5)), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.up(self.conv(x).relu()).relu(), self.down, stride=2).relu().mean((2, 3)) @ self.matrix
        answer: Tensor = self.fc(self.fc(x.relu()).relu())
        return answer


def by_hand(model: Weights) -> dict[str, tuple[int | None, Tensor]]:
    up = model.up.weight  # [4, 3, 2, 2]: two groups of two inputs and three outputs
    return {
        "conv": (0, model.conv.weight.abs().amax((1, 2, 3))),
        "up": (None, torch.cat([up[:2].abs().amax((0, 2, 3)), up[2:].abs().amax((0, 2, 3))])),
        "conv2d": (0, model.down.abs().amax((1, 2, 3))),
        "matmul": (1, model.matrix.abs().amax(0)),
        "fc": (0, model.fc.weight.abs().amax(1)),
    }


def test_the_largest_weight_of_every_output_channel(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = Weights()
    with torch.no_grad():
        model.conv.weight[2] = 0
        model.matrix[:, 4] = 0
    prepared, found = calibrated(model, batches)
    assert {decision.label for decision in placement_of(prepared).weights if decision.quantized} >= {"conv2d", "fc"}
    expected = by_hand(model)
    assert [weight.label for weight in found.weights] == list(expected)
    for weight in found.weights:
        axis, largest = expected[weight.label]
        assert weight.axis == axis
        assert weight.largest == pytest.approx(largest.tolist(), rel=1e-3)
        assert all(value == float(f"{value:.4g}") for value in weight.largest if value is not None)
        assert weight.dead == {"conv": (2,), "matmul": (4,)}.get(weight.label, ())


def test_weights_that_are_computed_stay_as_they_are(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
    prepared = prepare(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(8, 8, 3)).train(), input_shape=SHAPE)
    observers = observe(prepared, batches)
    set_ranges(prepared, observers, "max")
    before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    found = distributions(prepared, observers, CalibrationSettings("max"), 8)
    assert all(module.training for module in prepared.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.state_dict().items())
    assert found.weights[0].largest == pytest.approx(conv.eval().weight.abs().amax((1, 2, 3)).tolist(), rel=1e-3)


def test_a_network_in_float_and_weights_that_are_not_finite(batches: list[Tensor], tmp_path: Path) -> None:
    model = Weights()
    with torch.no_grad():
        model.fc.weight[1] = math.nan
    prepared = prepare(Weights(), input_shape=SHAPE, keep_float=["*"])
    prepared.load_state_dict(model.state_dict())
    observers = observe(prepared, batches)
    found = distributions(prepared, observers, CalibrationSettings(), 8)
    assert found.activations == ()
    assert [weight.label for weight in found.weights] == list(by_hand(model))
    assert found.weights[-1].largest[1] is None
    assert found.weights[-1].dead == ()
    write_distributions(tmp_path / "m.ranges.json", found)
