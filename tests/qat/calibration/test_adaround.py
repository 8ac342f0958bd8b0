"""AdaRound: against all roundings there are, every kind of layer, and what must stay as it was."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from export.fold import fold
from qat.base.errors import UserError
from qat.calibration.activation_ranges import calibrate_ranges
from qat.calibration.adaround import Rounded, adaround
from qat.fake_quantize.low_bit import simulate_bits
from qat.fake_quantize.prepare import prepare, weights_and_quantizers
from qat.fake_quantize.quantizer import WEIGHT, ActivationQuantizer, WeightQuantizer, per_channel, quantize, weight_amax
from qat.rules.placement import Decision, Placement, QuantizedRead, QuantizedTensor

COARSE = 127 / 3.3  # times amax: about three bits, so that rounding shows; no weight is at a code already


def images(count: int = 48, size: int = 8) -> Tensor:
    """Correlated as those of photographs: 3 channels of smooth noise, mixed."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(count, 3, size // 4, size // 4, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear")
    mix = torch.tensor([[1.0, 0.6, 0.5], [0.2, 1.0, 0.6], [0.3, 0.1, 1.0]])
    return torch.einsum("oi,nihw->nohw", mix, smooth) + 0.3


def calibrated(
    model: nn.Module, x: Tensor, coarse: float = COARSE, placement: Placement | None = None
) -> fx.GraphModule:
    """Prepared for INT8, its weights on grids ``coarse`` times as wide as they need to be."""
    prepared = prepare(model.eval(), placement, input_shape=x.shape[1:])
    calibrate_ranges(prepared, [x], "max")
    for _, weight, quantizer in weights_and_quantizers(prepared):
        quantizer.fix(weight_amax(weight, quantizer.axis) * coarse)
    return prepared


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def codes(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    return quantize(weight.detach(), per_channel(quantizer.scale(weight), weight.ndim, quantizer.axis), WEIGHT)


def check_codes(before: fx.GraphModule, after: fx.GraphModule) -> int:
    """Every code is one of the two around the weight, and what is stored is code * scale; counts what moved."""
    moved = 0
    pairs = zip(weights_and_quantizers(before), weights_and_quantizers(after), strict=True)
    for (_, was, _), (_, weight, quantizer) in pairs:
        scale = per_channel(quantizer.scale(weight), weight.ndim, quantizer.axis)
        quotient, now = was.detach() / scale, codes(weight, quantizer)
        clamped = [ends.clamp(WEIGHT.low, WEIGHT.high) for ends in (quotient.floor(), quotient.ceil())]
        assert ((now == clamped[0]) | (now == clamped[1])).all()
        assert torch.equal(weight, now * scale)
        assert torch.equal(quantizer(weight), weight)
        moved += int((now != quantize(was.detach(), scale, WEIGHT)).sum())
    return moved


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_comes_close_to_the_best_of_all_roundings(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(256, 2) @ torch.randn(2, 6) + torch.randn(256, 6) + 0.5
    prepared = calibrated(nn.Sequential(nn.Linear(6, 16)), x)
    before = copy.deepcopy(prepared)
    (found,) = adaround(prepared, [x], steps=400)
    ((_, parameter, quantizer),) = weights_and_quantizers(before)
    weight = parameter.detach()
    x_hat = next(m for m in before.modules() if isinstance(m, ActivationQuantizer))(x).double()
    target, scale = x.double() @ weight.T.double(), quantizer.scale(weight)[:, None].double()
    roundings = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64)  # [64, 6]
    below = (weight.double() / scale).floor()
    tried = (below[:, None] + roundings) * scale[:, None]  # [16, 64, 6]
    errors = (torch.einsum("ni,oki->nok", x_hat, tried) - target[:, :, None]).square().mean(0)  # [16, 64]
    best = float(errors.min(1).values.mean())
    nearest = float((x_hat @ quantizer(weight).T.double() - target).square().mean())
    assert found.mse_nearest == pytest.approx(nearest, rel=1e-4)
    assert best * 0.9999 <= found.mse <= 1.2 * best
    assert found.mse < 0.8 * found.mse_nearest


def test_every_layer_gets_better_and_the_network_too() -> None:
    x = images()
    prepared = calibrated(net(), x)
    before = copy.deepcopy(prepared)
    found = adaround(prepared, list(x.split(20)), steps=150)
    assert [one.layer for one in found] == ["0", "3", "7"]
    assert all(one.mse <= one.mse_nearest for one in found)
    assert sum(one.mse / one.mse_nearest for one in found) < 0.7 * len(found)
    assert check_codes(before, prepared) > 20
    wanted = net().eval()(x)
    with torch.no_grad():
        errors = [float((model.eval()(x) - wanted).square().mean()) for model in (prepared, before)]
    assert errors[0] < 0.8 * errors[1]


def test_the_exported_network_has_these_codes() -> None:
    x = images()
    prepared = calibrated(net(), x)
    adaround(prepared, [x], steps=30)
    expected = [codes(weight, quantizer) for _, weight, quantizer in weights_and_quantizers(prepared)]
    folded, _ = fold(prepared)
    stored = [folded.get_submodule(name).get_buffer("weight") for name in ("0", "3", "7")]
    sign = per_channel(prepared.get_submodule("1").weight.sign(), 4, 0)
    for left, right in zip(stored, [expected[0] * sign, *expected[1:]], strict=True):
        assert torch.equal(left.float(), right)


def test_a_range_that_is_not_fixed_becomes_the_largest_weight() -> None:
    x = images()
    prepared = prepare(net().eval(), input_shape=x.shape[1:])
    calibrate_ranges(prepared, [x], "max")
    before = copy.deepcopy(prepared)
    adaround(prepared, [x], steps=30)
    pairs = zip(weights_and_quantizers(before), weights_and_quantizers(prepared), strict=True)
    for (_, was, _), (_, _, quantizer) in pairs:
        assert quantizer.amax is not None
        assert torch.equal(quantizer.amax, weight_amax(was, quantizer.axis))
    check_codes(before, prepared)


class Cut(nn.Module):
    """A linear layer before a ReLU. Where ``apart``, somebody else reads what it makes too."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.linear, self.apart = nn.Linear(3, 4), apart
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([1.42, 1.36, 3.0]))  # codes, at scale 1
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y.relu(), y if self.apart else x


@pytest.mark.parametrize(("apart", "expected"), [(False, [2, 1]), (True, [1, 1])])
def test_f_holds_the_activation_function(apart: bool, expected: list[int]) -> None:
    """Of x = (1, 1, 0) it makes 2.78, nearest to 2 + 1; the other two inputs want 1 and 1, but are cut off."""
    x = torch.tensor([[1.0, 1, 0], [-9, 0, 0], [0, -9, 0]]).repeat(16, 1)
    prepared = calibrated(Cut(apart), x, 127 / 3)
    adaround(prepared, [x], steps=200)
    linear = prepared.get_submodule("linear")
    assert codes(linear.weight, linear.weight_quantizer)[:, :2].tolist() == [expected] * 4


class Functional(nn.Module):
    """A weight that functions read, tied to a module's; a batch normalization as a function, its constants behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.tied = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3, stride=2)
        self.tied.weight = self.conv.weight
        self.weight = nn.Parameter(torch.randn(8, 16, 1, 1) / 4)
        self.register_buffer("mean", torch.randn(8) / 4)
        self.register_buffer("variance", torch.rand(8) + 0.5)
        self.matrix = nn.Parameter(torch.randn(8, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu().mean((2, 3), keepdim=True) + self.tied(x).relu()
        y = F.batch_norm(F.conv2d(y, self.weight), self.mean, self.variance).relu()
        return torch.matmul(y.flatten(2).transpose(1, 2), self.matrix)


def test_functions_and_tied_weights() -> None:
    x = images()
    prepared = calibrated(Functional(), x)
    before = copy.deepcopy(prepared)
    found = adaround(prepared, [x], steps=100)
    assert [one.layer for one in found] == ["conv", "conv2d", "matmul"]
    assert all(one.mse < one.mse_nearest for one in found)
    check_codes(before, prepared)
    assert prepared.get_submodule("tied").weight is prepared.get_submodule("conv").weight


def test_tied_weights_have_one_range() -> None:
    x = images()
    prepared = prepare(Functional().eval(), input_shape=x.shape[1:])
    calibrate_ranges(prepared, [x], "max")
    adaround(prepared, [x], steps=20)
    first, second = (prepared.get_submodule(name).weight_quantizer for name in ("conv", "tied"))
    assert torch.equal(first.amax, second.amax)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 16, 3, groups=2, stride=2),
        nn.ConvTranspose2d(16, 8, 3, stride=2),
        nn.ConvTranspose2d(16, 8, 2, groups=2),
        nn.Conv2d(16, 8, 1, padding=1, padding_mode="reflect"),
    ],
    ids=["depthwise", "grouped", "transposed", "grouped transposed", "reflecting"],
)
def test_every_kind_of_convolution(layer: nn.Module) -> None:
    """Each alone, and quantized whatever the rules say of its speed."""
    torch.manual_seed(4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.einsum("oi,nihw->nohw", torch.randn(16, 3), images())
    read = QuantizedTensor("input_1", "input_1", (QuantizedRead("_0", "weighted_input"),))
    decision = Decision("_0", "0", "convolution", True, "weighted_input")
    prepared = calibrated(nn.Sequential(layer), x, COARSE, Placement((read,), (decision,)))
    before = copy.deepcopy(prepared)
    (found,) = adaround(prepared, [x], steps=150)
    assert found.mse < 0.9 * found.mse_nearest
    assert check_codes(before, prepared) > 0


def test_zero_weights_stay_zero_and_dead_channels_round_to_nearest() -> None:
    x = images()
    model = net()
    with torch.no_grad():
        model[0].weight[2] = 0  # a channel without weights
        model[3].weight[:, 5] = 0  # pruned
        model[3].bias[1] = -1e4  # never passes the ReLU
    prepared = calibrated(model, x)
    was = model[3].weight.detach().clone()
    found = adaround(prepared, [x], steps=100)
    assert all(one.mse < one.mse_nearest for one in found)
    assert not prepared.get_submodule("0").weight[2].any()
    conv = prepared.get_submodule("3")
    assert not conv.weight[:, 5].any()
    assert torch.equal(conv.weight[1], conv.weight_quantizer(was)[1])
    assert not torch.equal(conv.weight, conv.weight_quantizer(was))


def test_equal_seeds_give_equal_weights_and_no_other_randomness_is_used() -> None:
    x, results = images(80), []
    state = torch.get_rng_state()
    for seed, disturbed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbed)
        prepared = calibrated(net(), x)
        torch.manual_seed(disturbed)
        expected = torch.get_rng_state()
        found = adaround(prepared, [x], steps=40, seed=seed)
        assert torch.equal(torch.get_rng_state(), expected)
        results.append((found, prepared.state_dict()))
    torch.set_rng_state(state)
    assert results[0][0] == results[1][0] != results[2][0]
    assert all(torch.equal(tensor, results[1][1][key]) for key, tensor in results[0][1].items())


def states(prepared: fx.GraphModule) -> list[tuple[object, ...]]:
    modes = [(module.training, getattr(module, "enabled", None)) for module in prepared.modules()]
    return [*modes, *((p.requires_grad, p.grad is None) for p in prepared.parameters())]


def test_all_but_weights_and_ranges_stays_as_it_was() -> None:
    x = images()
    given = x.clone()
    prepared = calibrated(net(), x).train()
    prepared.get_submodule("1").eval()
    prepared.get_submodule("7").bias.requires_grad_(False)
    prepared.get_submodule("3").weight_quantizer.enabled = False
    parameters, modes, before = list(prepared.parameters()), states(prepared), copy.deepcopy(prepared.state_dict())
    seen: list[str] = []
    found = adaround(prepared, [x], steps=20, on_layer=seen.append)
    assert seen == [one.layer for one in found] == ["0", "3", "7"]
    assert all(one is other for one, other in zip(prepared.parameters(), parameters, strict=True))
    assert states(prepared) == modes
    changed = {key for key, tensor in prepared.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {"0.weight", "3.weight", "7.weight"}
    assert torch.equal(x, given)


def test_after_an_error_nothing_has_changed() -> None:
    x = images()
    prepared = calibrated(net(), x).train()
    modes, before = states(prepared), copy.deepcopy(prepared.state_dict())

    def stop(layer: str) -> None:
        if layer == "7":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adaround(prepared, [x], steps=5, on_layer=stop)
    assert states(prepared) == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in prepared.state_dict().items())


def test_it_never_gets_worse_in_a_single_step() -> None:
    x = images()
    prepared = calibrated(net(), x)
    before = copy.deepcopy(prepared)
    for one in adaround(prepared, [x], steps=1):
        assert isinstance(one, Rounded)
        assert one.mse <= one.mse_nearest
    check_codes(before, prepared)


def test_what_cannot_be_rounded_is_refused() -> None:
    x = images()
    prepared = calibrated(net(), x)
    with pytest.raises(UserError, match="no images"):
        adaround(prepared, [])
    with pytest.raises(ValueError, match="at least 1"):
        adaround(prepared, [x], steps=0)
    uncalibrated = prepare(net().eval(), input_shape=x.shape[1:])
    with pytest.raises(UserError, match="the output of 0 is NaN or infinite: calibrate"):
        adaround(uncalibrated, [x])


def test_few_bits_get_their_own_codes() -> None:
    prepared = prepare(net().eval(), input_shape=(3, 8, 8))
    simulate_bits(prepared, 3)
    calibrate_ranges(prepared, [images()], "max")
    adaround(prepared, [images()], steps=40)
    highest = {}
    for path, weight, quantizer in weights_and_quantizers(prepared):
        scale = per_channel(quantizer.scale(weight), weight.ndim, quantizer.axis)
        found = weight.detach() / scale
        assert (found - found.round()).abs().max() < 1e-3
        highest[path] = found.abs().max().round().item()
    assert highest["3.weight_quantizer"] == 3
    assert highest["0.weight_quantizer"] == 127
