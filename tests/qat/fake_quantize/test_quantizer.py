"""The numerics of qat/fake_quantize/quantizer.py against a NumPy oracle written from the formula at its top."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.base.number_format import NumberFormat
from qat.fake_quantize.quantizer import (
    ACTIVATION,
    SCALE_FLOOR,
    WEIGHT,
    ActivationQuantizer,
    WeightQuantizer,
    fake_quantize,
    fake_quantize_weight,
    learned_fake_quantize,
    per_channel,
    quantize,
    scale_from_amax,
    weight_amax,
)

F32 = np.float32


def oracle_scale(amax: np.ndarray) -> np.ndarray:
    return np.maximum(amax.astype(F32) / F32(127), np.finfo(F32).tiny)


def oracle_codes(x: np.ndarray, scale: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.clip(np.rint(x.astype(F32) / scale), low, high)  # np.rint rounds half to even


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activation_quantizer(amax: float) -> ActivationQuantizer:
    quantizer = ActivationQuantizer()
    quantizer.amax.fill_(amax)
    return quantizer


class TestCodes:
    @pytest.mark.parametrize("codes", [ACTIVATION, WEIGHT])
    def test_half_rounds_to_even(self, codes: NumberFormat):
        x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 125.5, 126.5])
        expected = torch.tensor([-2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 126.0, 126.0])
        assert torch.equal(quantize(x, torch.tensor(1.0), codes), expected)

    @pytest.mark.parametrize(("codes", "low"), [(ACTIVATION, -128), (WEIGHT, -127)])
    def test_codes_are_clamped_at_both_ends(self, codes: NumberFormat, low: int):
        x = torch.tensor([-math.inf, -1e30, -128.6, -127.6, 126.9, 127.6, 1e30, math.inf])
        found = quantize(x, torch.tensor(1.0), codes)
        assert found.tolist() == [low, low, low, low, 127, 127, 127, 127]

    @pytest.mark.parametrize(("low", "high"), [(-129, 127), (-128, 128), (1, 127), (-128, 0)])
    def test_codes_beyond_int8_are_refused(self, low: int, high: int):
        with pytest.raises(ValueError, match="must lie in"):
            NumberFormat("INT8", low, high, "INT8")

    @pytest.mark.parametrize("amax", [0.3, 1.0, 2.7, 6.0])
    def test_activations_are_the_oracles_codes_times_scale_bitwise(self, amax: float):
        x = gaussian(100_003)
        scale = oracle_scale(np.array(amax))
        expected = oracle_codes(x.numpy(), scale, -128, 127) * scale
        found = activation_quantizer(amax)(x)
        np.testing.assert_array_equal(found.numpy().view(np.int32), expected.view(np.int32))

    def test_fake_quantization_is_idempotent(self):
        quantizer, x = activation_quantizer(2.0), gaussian(10_000)
        assert torch.equal(quantizer(quantizer(x)), quantizer(x))

    def test_a_numpy_oracle_at_the_sqnr_of_the_theory(self):
        # Uniform error of variance scale^2 / 12; 6 sigma clip next to nothing.
        x = gaussian(1_000_000)
        error = (activation_quantizer(6.0)(x) - x).double()
        sqnr_db = 10 * math.log10(x.double().square().sum() / error.square().sum())
        assert sqnr_db == pytest.approx(10 * math.log10(12 * 127**2 / 6**2), abs=0.05)  # 37.3 dB


class TestWeights:
    @pytest.mark.parametrize(
        ("shape", "axis"),
        [((16, 8, 3, 3), 0), ((8, 16, 2, 2), 1), ((10, 32), 0), ((6, 1, 5), 0), ((4, 6, 5), 1)],
    )
    def test_each_channel_is_the_oracles_bitwise(self, shape: tuple[int, ...], axis: int):
        """Axis 0: convolutions and linear layers; axis 1: products x @ w."""
        spread = per_channel(torch.logspace(-3, 2, shape[axis]), len(shape), axis)
        weight = gaussian(*shape) * spread
        quantizer = WeightQuantizer(axis)
        found = quantizer(weight).numpy()
        for channel in range(shape[axis]):
            w = weight.numpy().take(channel, axis)
            scale = oracle_scale(np.abs(w).max())
            codes = oracle_codes(w, scale, -127, 127)
            assert np.abs(codes).max() == 127
            np.testing.assert_array_equal(found.take(channel, axis), codes * scale)
            assert quantizer.scale(weight)[channel].item() == scale

    def test_one_scale_is_the_oracles_bitwise(self):
        """Of transposed convolutions."""
        weight = gaussian(8, 16, 2, 2) * per_channel(torch.logspace(-1, 1, 16), 4, 1)
        quantizer = WeightQuantizer(None)
        scale = oracle_scale(np.abs(weight.numpy()).max())
        np.testing.assert_array_equal(quantizer(weight), oracle_codes(weight.numpy(), scale, -127, 127) * scale)
        assert quantizer.scale(weight).shape == ()
        assert quantizer.scale(weight).item() == scale

    def test_no_code_needs_clamping(self):
        weight = gaussian(2000, 50) * 10 ** (10 * gaussian(2000, 1, seed=1))
        scale = per_channel(scale_from_amax(weight_amax(weight, 0)), 2, 0)
        assert (weight / scale).round().abs().max() == 127

    def test_amax_is_the_largest_magnitude_of_each_channel(self):
        weight = torch.tensor([[1.0, -3.0], [-2.0, 0.5]])
        assert weight_amax(weight, 0).tolist() == [3.0, 2.0]
        assert weight_amax(weight, 1).tolist() == [2.0, 3.0]

    def test_a_dead_channel_has_the_smallest_normal_scale_and_stays_zero(self):
        weight = gaussian(3, 5)
        weight[1] = 0
        scale = WeightQuantizer(0).scale(weight)
        assert scale[1] == SCALE_FLOOR == np.finfo(F32).tiny
        found = WeightQuantizer(0)(weight)
        assert torch.equal(found[1], torch.zeros(5))
        assert found.isfinite().all()

    def test_a_disabled_quantizer_returns_the_weight(self):
        quantizer, weight = WeightQuantizer(0), gaussian(3, 5)
        quantizer.enabled = False
        assert quantizer(weight) is weight

    def test_it_has_no_state(self):
        assert not WeightQuantizer(0).state_dict()


class TestScale:
    @pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-38, 1.4e-36])
    def test_it_is_never_below_the_smallest_normal_float(self, amax: float):
        assert scale_from_amax(torch.tensor(amax)) == SCALE_FLOOR

    @pytest.mark.parametrize("amax", [2e-36, 1e-3, 127.0, 3e38])
    def test_it_is_amax_over_127(self, amax: float):
        assert scale_from_amax(torch.tensor(amax)).item() == F32(amax) / F32(127)

    def test_a_floored_activation_stays_finite(self):
        assert activation_quantizer(0.0)(torch.tensor([0.0, 3e38, -3e38])).abs().max() <= 128 * SCALE_FLOOR


class TestGradient:
    def test_it_passes_inside_the_clamp_range_and_stops_outside(self):
        x = torch.tensor([-129.0, -128.01, -128.0, -127.0, 0.0, 0.5, 127.0, 127.01, 500.0], requires_grad=True)
        grad = torch.arange(1.0, 10.0)
        fake_quantize(x, torch.tensor(1.0)).backward(grad)
        assert x.grad is not None
        assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 7, 0, 0]

    @pytest.mark.parametrize("amax", [0.7, 1.0, 3.3])
    def test_it_is_the_oracles(self, amax: float):
        x = (2 * gaussian(10_000)).requires_grad_()
        activation_quantizer(amax)(x).sum().backward()
        quotient = x.detach().numpy() / oracle_scale(np.array(amax))
        assert x.grad is not None
        np.testing.assert_array_equal(x.grad.numpy(), (quotient >= -128) & (quotient <= 127))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_clamp_range_is_not_rounded_to_a_narrow_type(self, dtype: torch.dtype):
        for amax in (0.9985, 1.0028, 2.01, 3.009):
            x = torch.linspace(-4, 4, 4001).to(dtype).requires_grad_()
            activation_quantizer(amax)(x).sum().backward()
            quotient = x.detach().float().numpy() / oracle_scale(np.array(amax))
            assert x.grad is not None
            expected = (quotient >= -128) & (quotient <= 127)
            np.testing.assert_array_equal(x.grad.float().numpy(), expected, err_msg=f"amax {amax}")

    def test_weights_get_it_unchanged(self):
        weight, grad = gaussian(4, 3, 3, 3).requires_grad_(), gaussian(4, 3, 3, 3, seed=1)
        fake_quantize_weight(weight, 0).backward(grad)
        assert weight.grad is not None
        assert torch.equal(weight.grad, grad)

    def test_the_scale_gets_none(self):
        scale = torch.tensor(0.1, requires_grad=True)
        x = gaussian(10).requires_grad_()
        fake_quantize(x, scale).sum().backward()
        assert scale.grad is None


class TestCompiled:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ["activation", "rectified", "learned", "weight"])
    def test_the_gradient_is_the_same(self, name: str, dtype: torch.dtype):
        scale = torch.tensor(0.02, requires_grad=name == "learned")
        function = {
            "activation": lambda x: fake_quantize(x, scale),
            "rectified": lambda x: fake_quantize(x, scale, NumberFormat("INT8", 0, 127, "INT8")),
            "learned": lambda x: learned_fake_quantize(x, scale),
            "weight": lambda x: fake_quantize_weight(x, 0),
        }[name]
        x, grad = gaussian(8, 100).to(dtype).requires_grad_(), gaussian(8, 100, seed=1).to(dtype)
        learned = [x, *([scale] if scale.requires_grad else [])]
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        expected, found = (torch.autograd.grad(made(x), learned, grad) for made in (function, compiled))
        assert all(one.any() for one in expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class TestTypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_quotient_is_float32_also_under_autocast(self, dtype: torch.dtype):
        x = gaussian(50_000).to(dtype)
        scale = oracle_scale(np.array(3.0))
        expected = oracle_codes(x.float().numpy(), scale, -128, 127) * scale
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = activation_quantizer(3.0)(x)
        assert found.dtype == dtype
        assert torch.equal(found, torch.from_numpy(expected).to(dtype))
        narrow = (x / torch.tensor(scale, dtype=dtype)).round().clamp(-128, 127)
        codes = quantize(x, torch.from_numpy(np.asarray(scale)), ACTIVATION)
        assert not torch.equal(narrow.float(), codes)  # what the narrow type would have computed differs

    def test_float32_stays_float32_under_autocast(self):
        x, quantizer = gaussian(1000), activation_quantizer(3.0)
        weight = gaussian(8, 9)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(quantizer(x), fake_quantize(x, scale_from_amax(quantizer.amax)))
            inside = fake_quantize_weight(weight, 0)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, fake_quantize_weight(weight, 0))


class TestActivationQuantizer:
    def test_its_input_is_left_alone(self):
        x = gaussian(100)
        before = x.clone()
        activation_quantizer(1.0)(x)
        assert torch.equal(x, before)

    def test_it_yields_nan_until_calibrated(self):
        assert ActivationQuantizer()(torch.ones(3)).isnan().all()

    def test_disabled_it_passes_its_input(self):
        quantizer, x = activation_quantizer(0.1), gaussian(10)
        quantizer.enabled = False
        assert quantizer(x) is x

    def test_an_observer_sees_what_passes_unchanged(self):
        seen = []

        class Observer(torch.nn.Module):
            def forward(self, x: Tensor) -> None:
                seen.append(x)

        quantizer, x = activation_quantizer(0.1), gaussian(10)
        quantizer.observer = Observer()
        assert quantizer(x) is x
        assert seen[0] is x

    def test_amax_is_its_state(self):
        assert activation_quantizer(1.5).state_dict() == {"amax": torch.tensor(1.5)}
        assert "amax=1.5" in repr(activation_quantizer(1.5))
