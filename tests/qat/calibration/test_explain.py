"""How a range is chosen, as numbers: they are those of calibration, and of a computation by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from explanations import KINDS, explained, observer_of, samples
from own_network import Net
from torch import Tensor, fx, nn

from qat.base.choices import Calibrator
from qat.base.errors import UserError
from qat.base.number_format import INT8, NumberFormat, low_bit_format
from qat.calibration.activation_ranges import calibrate_ranges, choose_ranges, observe
from qat.calibration.explain import explain_calibration, say_explanations
from qat.fake_quantize.low_bit import simulate_bits
from qat.fake_quantize.prepare import activation_quantizers, prepare
from qat.fake_quantize.quantizer import fake_quantize, scale_from_amax

SHAPE = (3, 16, 16)
NAMES = ["x", "relu", "relu_1", "flatten"]


FORMATS = (INT8, low_bit_format(4, signed=True), low_bit_format(4, signed=False))


@pytest.fixture
def prepared() -> fx.GraphModule:
    torch.manual_seed(0)
    return prepare(Net(), input_shape=SHAPE)


@pytest.fixture
def batches() -> list[Tensor]:
    return list(torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(2)).split(4))


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_marked_minimum_is_what_calibration_chooses(kind: str, number_format: NumberFormat) -> None:
    x = samples(kind)
    observer, found = observer_of(x), explained(x, number_format)
    for curve, method in ((found.kl, "entropy"), (found.mse, "mse")):
        assert curve is not None
        (chosen,) = choose_ranges([observer], method, levels=number_format.levels)  # type: ignore[arg-type]
        assert curve.amax[curve.best] == chosen
        assert curve.cost[curve.best] == pytest.approx(min(curve.cost), rel=1e-7, abs=1e-100)
        assert curve.amax[-1] == found.largest == float(x.abs().max())
    choices = {choice.method: choice.amax for choice in found.choices}
    assert choices == {
        method: choose_ranges([observer], method, 99.99, number_format.levels)[0] for method in get_args(Calibrator)
    }


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["signed", "relu", "heavy tail", "outlier"])
def test_the_table_agrees_with_the_values_themselves(kind: str, number_format: NumberFormat) -> None:
    x = samples(kind)
    for choice in explained(x, number_format).choices:
        scale = scale_from_amax(torch.tensor(choice.amax), number_format)
        assert choice.scale == scale.item()
        above = 100 * float((x.abs() > choice.amax).double().mean())
        assert choice.clipped == pytest.approx(above, abs=1e-2)
        # The histogram knows no signs, and the lowest code is one further than the highest.
        noise = (x.abs() - fake_quantize(x.abs(), scale, number_format)).double().square().sum()
        measured = 10 * math.log10(float(x.double().square().sum() / noise))
        assert choice.sqnr_db == pytest.approx(measured, abs=0.3)


def test_the_table_and_the_curves_are_one() -> None:
    found = explained(samples("relu"))
    assert found.kl is not None
    assert found.mse is not None
    choices = {choice.method: choice for choice in found.choices}
    assert choices["entropy"].kl == found.kl.cost[found.kl.best]
    assert choices["max"].kl == found.kl.cost[-1]
    signal = float(samples("relu").double().square().mean())
    of_curve = 10 * math.log10(signal / found.mse.cost[found.mse.best])
    assert choices["mse"].sqnr_db == pytest.approx(of_curve, abs=0.01)


def test_a_threshold_below_the_candidates_has_no_divergence() -> None:
    choices = {choice.method: choice for choice in explained(samples("outlier")).choices}
    assert choices["percentile"].amax < 40 * 128 / 2048 * 2
    low = explained(torch.cat([samples("signed"), torch.tensor([300.0])])).choices
    (percentile,) = (choice for choice in low if choice.method == "percentile")
    assert percentile.kl is None
    assert percentile.clipped < 0.01


def test_a_tensor_of_zeros_and_one_that_was_not_reached(capsys: pytest.CaptureFixture[str]) -> None:
    dead, absent = explained(torch.zeros(7), in_use=0.0), explained(None)
    assert "zero for every calibration image" in dead.problem
    assert (dead.kl, dead.mse, dead.largest) == (None, None, 0.0)
    assert {(c.amax, c.clipped, c.sqnr_db, c.kl) for c in dead.choices} == {(0.0, 0.0, None, None)}
    assert "not computed for any calibration image" in absent.problem
    assert (absent.kl, absent.choices, sum(absent.counts)) == (None, (), 0)
    say_explanations([dead, absent])
    said = capsys.readouterr().out
    assert dead.problem in said
    assert absent.problem in said
    assert "nan" not in said


def test_the_range_in_use_is_marked_and_listed_if_it_is_another(
    prepared: fx.GraphModule, batches: list[Tensor]
) -> None:
    assert not any(choice.in_use for one in explain_calibration(prepared, batches) for choice in one.choices)
    calibrate_ranges(prepared, batches, "entropy")
    for one in explain_calibration(prepared, batches):
        used = {choice.method for choice in one.choices if choice.in_use}
        assert "entropy" in used
        assert "in use" not in used
    activation_quantizers(prepared)["relu"].amax.fill_(1.25)
    (one,) = explain_calibration(prepared, batches, ["relu"])
    assert [(c.method, c.amax, c.scale) for c in one.choices if c.in_use] == [
        ("in use", 1.25, pytest.approx(1.25 / 127))
    ]
    assert len(one.choices) == 5


def test_bits_that_are_simulated_change_the_candidates(prepared: fx.GraphModule, batches: list[Tensor]) -> None:
    simulate_bits(prepared, 3)
    calibrate_ranges(prepared, batches, "mse")
    found = {one.name: one for one in explain_calibration(prepared, batches)}
    assert (found["x"].number_format, found["relu"].number_format.levels) == (INT8, 8)
    for one in found.values():
        assert one.kl is not None
        levels = one.number_format.levels
        assert one.kl.amax[0] == pytest.approx(levels * one.limit / 2048)
        assert "mse" in {choice.method for choice in one.choices if choice.in_use}


def test_the_model_stays_as_it_is(prepared: fx.GraphModule, batches: list[Tensor]) -> None:
    calibrate_ranges(prepared.train(), batches)
    before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
    explain_calibration(prepared, batches)
    assert prepared.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.state_dict().items())


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["*"], NAMES),
        (["relu"], ["relu"]),  # both have this label, and only one this name
        (["rel[u]"], ["relu", "relu_1"]),
        (["relu_1"], ["relu_1"]),
        (["relu_?", "x", "x"], ["x", "relu_1"]),
        (["add*", "x"], None),
        (["[fx]*"], ["x", "flatten"]),
    ],
)
def test_patterns(
    prepared: fx.GraphModule, batches: list[Tensor], patterns: list[str], names: list[str] | None
) -> None:
    if names is None:
        with pytest.raises(UserError, match=r"--explain add\* names no quantized tensor"):
            explain_calibration(prepared, batches, patterns)
        return
    assert [one.name for one in explain_calibration(prepared, batches, patterns)] == names


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("rellu", r"names no quantized tensor \(did you mean relu or relu_1\?\)"),
        ("conv2", "names no quantized tensor: it reads relu; give that"),
        ("conv1", "names no quantized tensor: it reads x; give that"),
        ("bn1", "what it makes is not quantized: give the name of one, for example x, relu, relu_1"),
        ("zzz", "names no quantized tensor: give the name of one, for example x, relu, relu_1"),
    ],
)
def test_a_pattern_without_a_quantized_tensor(prepared: fx.GraphModule, pattern: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        explain_calibration(prepared, [], [pattern])


def test_mistakes_are_told_before_the_images_are_read(prepared: fx.GraphModule) -> None:
    def never() -> object:
        raise AssertionError("read")
        yield

    with pytest.raises(UserError, match="--percentile 0 is out of range"):
        explain_calibration(prepared, never(), percentile=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="calibration got no images"):
        explain_calibration(prepared, [])


def test_tensors_that_share_a_scale_are_explained_once() -> None:
    class Concat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            last: Tensor = self.last(torch.cat([self.one(x).relu(), self.two(x).relu()], 1))
            return last

    prepared = prepare(Concat(), input_shape=SHAPE)
    batch = torch.randn(2, *SHAPE)
    everything = explain_calibration(prepared, [batch])
    (shared,) = (one for one in everything if len(one.tensors) > 1)
    assert {"relu", "relu_1"} <= set(shared.tensors)
    for tensor in shared.tensors:
        assert shared.name in [one.name for one in explain_calibration(prepared, [batch], [tensor])]
    observers = observe(prepared, [batch])
    assert len(observers) == len(everything)
