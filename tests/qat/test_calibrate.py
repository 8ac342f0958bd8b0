"""Calibration against a NumPy oracle: the formulas at the top of qat/calibrate.py, loop by loop."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from qat import calibrate as calibration
from qat.artifact import UserError
from qat.calibrate import BINS, HistogramObserver, Method, calibrate, observe, set_ranges
from qat.quantizer import ActivationQuantizer, WeightQuantizer, fake_quantize, scale_from_amax

METHODS = get_args(Method)


def thresholds(counts: np.ndarray) -> range:
    return range(128, max(128, int(np.flatnonzero(counts).max()) + 1) + 1)


def oracle_kl(counts: np.ndarray) -> list[float]:
    divergences = []
    for i in thresholds(counts):
        p = counts[:i].astype(float)
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        for k in range(128):
            group = slice(k * i // 128, (k + 1) * i // 128)
            filled = p[group] > 0
            if filled.any():
                q[group][filled] = counts[group].sum() / filled.sum()
        divergences.append(scipy.stats.entropy(p, q))  # normalizes both
    return divergences


def oracle_mse(counts: np.ndarray) -> list[float]:
    x = np.arange(len(counts)) + 0.5
    errors = []
    for i in thresholds(counts):
        scale = i / 127
        x_hat = np.clip(np.rint(x / scale), -128, 127) * scale
        errors.append((counts * (x - x_hat) ** 2).sum() / counts.sum())
    return errors


def histogram(kind: str, bins: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    samples = {
        "gaussian": np.abs(rng.normal(size=50_000)),
        "relu": np.maximum(0, rng.normal(size=50_000)),
        "heavy tail": np.abs(rng.standard_t(3, size=50_000)),
        "empty bins": np.abs(rng.normal(size=300)),
        "outlier far away": np.append(np.abs(rng.normal(size=50_000)), 30.0),
        "grown range": np.append(np.abs(rng.normal(size=50_000)), 0.0),
    }[kind]
    limit = samples.max() * (1.9 if kind == "grown range" else 1)
    return np.histogram(samples, bins, (0, limit))[0]


KINDS = ["gaussian", "relu", "heavy tail", "empty bins", "outlier far away", "grown range"]


def sqnr_db(x: Tensor, amax: float) -> float:
    error = fake_quantize(x, scale_from_amax(torch.tensor(amax))) - x
    return 10 * math.log10(x.double().square().sum() / error.double().square().sum())


def observed(*batches: Tensor) -> HistogramObserver:
    observer = HistogramObserver("x")
    for batch in batches:
        observer(batch)
    return observer


class TestChoosing:
    @pytest.mark.parametrize("bins", [128, 300, BINS])
    @pytest.mark.parametrize("kind", KINDS)
    def test_kl_is_the_oracles_for_every_threshold(self, kind: str, bins: int):
        counts = histogram(kind, bins)
        found = calibration.kl_of_thresholds(torch.tensor(counts)).numpy()
        np.testing.assert_allclose(found, oracle_kl(counts), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("bins", [128, 300, BINS])
    @pytest.mark.parametrize("kind", KINDS)
    def test_mse_is_the_oracles_for_every_threshold(self, kind: str, bins: int):
        counts = histogram(kind, bins)
        found = calibration.mse_of_thresholds(torch.tensor(counts)).numpy()
        np.testing.assert_allclose(found, oracle_mse(counts), rtol=1e-7)

    @pytest.mark.parametrize("kind", KINDS)
    def test_amax_is_at_the_oracles_minimum(self, kind: str):
        counts = histogram(kind, BINS)
        limit, tensor = 7.5, torch.tensor(counts)
        assert calibration.amax_mse(tensor, limit) == (128 + np.argmin(oracle_mse(counts))) * limit / BINS
        counts[0] = min(counts[0], counts[1])
        expected = (128 + np.argmin(oracle_kl(counts))) * limit / BINS
        assert calibration.amax_entropy(tensor, limit) == pytest.approx(expected, rel=1e-12)

    def test_clipped_mass_in_an_empty_group_is_infinitely_bad(self):
        counts = torch.zeros(512, dtype=torch.int64)
        counts[:100], counts[500] = 10, 1
        kl = calibration.kl_of_thresholds(counts)
        assert not kl.isnan().any()
        assert kl[:100].isinf().all()
        assert kl[-1].isfinite()

    def test_of_equal_minima_the_largest_threshold_is_chosen(self):
        counts = torch.zeros(256, dtype=torch.int64)
        counts[255] = 5  # one filled bin: clipping below it is impossible, and at its end exact
        assert calibration.amax_entropy(counts, 1.0) == 1.0
        assert calibration._best_threshold(torch.tensor([1.0, 0.5, 0.5, 2.0])) == 128 + 2

    @pytest.mark.parametrize("percentile", [0.01, 50, 99, 99.99, 100])
    def test_percentile_is_numpys_to_one_bin(self, percentile: float):
        x = np.abs(np.random.default_rng(0).normal(size=100_000)).astype(np.float32)
        observer = observed(torch.from_numpy(x))
        found = calibration.amax_percentile(observer.counts, observer.limit, percentile)
        exact = np.percentile(x, percentile, method="inverted_cdf")
        assert exact <= found * (1 + 1e-6)
        assert found <= exact + 1.001 * observer.limit / BINS

    @pytest.mark.parametrize("percentile", [0, -1, 100.1, math.nan])
    def test_an_impossible_percentile_is_refused(self, percentile: float):
        with pytest.raises(UserError, match=r"percentile.*choose one above 0"):
            calibration.amax_percentile(torch.ones(BINS, dtype=torch.int64), 1.0, percentile)

    def test_the_zeros_of_a_relu_do_not_narrow_the_range(self):
        gaussian = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
        for x in (gaussian, gaussian.relu()):
            observer = observed(x)
            best = sqnr_db(x, calibration.amax_mse(observer.counts, observer.limit))
            entropy = sqnr_db(x, calibration.amax_entropy(observer.counts, observer.limit))
            assert best > 40.4  # the least error that INT8 allows a gaussian, in dB
            assert entropy > best - 1.5
        zeros_kept = calibration._best_threshold(calibration.kl_of_thresholds(observer.counts))
        assert sqnr_db(x, zeros_kept * observer.limit / BINS) < 25


class TestObserver:
    def test_counts_are_numpys(self):
        x = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
        observer = observed(x)
        assert observer.limit == observer.amax == x.abs().max()
        expected = np.histogram(x.abs().double().numpy(), BINS, (0, observer.limit))[0]
        assert observer.counts.sum() == 10_000
        # A value at the edge of two bins may fall into either one, by float32 rounding.
        assert np.abs(np.cumsum(expected) - observer.counts.cumsum(0).numpy()).max() <= 1

    def test_growth_merges_bins_and_keeps_every_count(self):
        x = torch.rand(5_000, generator=torch.Generator().manual_seed(2))
        x[0] = 1.0
        before, after = observed(x), observed(x, torch.tensor([6.5]))
        assert (after.limit, after.amax) == (8.0, 6.5)
        assert torch.equal(after.counts[: BINS // 8], before.counts.view(-1, 8).sum(dim=1))
        assert after.counts[int(6.5 / 8 * BINS)] == 1
        assert after.counts.sum() == 5_001

    def test_growth_by_more_than_all_bins(self):
        observer = observed(torch.full((7,), 1e-20), torch.tensor([3.0, 1e20]))
        assert observer.counts[0] == 8
        assert observer.counts.sum() == 9
        assert observer.limit >= observer.amax == pytest.approx(1e20)

    def test_zeros_before_the_first_value(self):
        observer = observed(torch.zeros(5), torch.tensor([2.0, 0.0]))
        assert observer.counts[0] == 6
        assert observer.counts[-1] == 1
        assert (observer.limit, observer.amax) == (2.0, 2.0)

    def test_order_of_batches_keeps_the_total(self):
        batches = [torch.randn(1000, generator=torch.Generator().manual_seed(s)) * 3**s for s in range(5)]
        for order in (batches, batches[::-1]):
            assert observed(*order).counts.sum() == 5000
            assert observed(*order).amax == max(b.abs().max() for b in batches)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_float_types_count_as_float32(self, dtype: torch.dtype):
        x = torch.randn(70_000, generator=torch.Generator().manual_seed(3)).to(dtype)
        observer, reference = observed(x), observed(x.float())
        assert torch.equal(observer.counts, reference.counts)
        assert observer.amax == reference.amax

    def test_memory_layout_does_not_matter(self):
        x = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(4))
        reference = observed(x)
        layouts = (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x.permute(2, 0, 3, 1))
        for view in layouts:
            assert torch.equal(observed(view).counts, reference.counts)
        assert observed(x[:, ::2, 1:]).counts.sum() == 2 * 3 * 4 * 4
        assert observed(torch.ones(1, 3).expand(4, 3)).counts.sum() == 12
        assert observed(torch.tensor(2.0)).counts[-1] == 1

    def test_dense_layouts_are_not_copied(self):
        x = torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last)
        assert calibration._flat(x).data_ptr() == x.data_ptr()

    def test_more_counts_than_float32_holds(self):
        observer = observed(torch.ones(1), torch.zeros(2**24 + 5), torch.zeros(2))
        assert observer.counts[0] == 2**24 + 7

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_not_finite_names_the_tensor(self, bad: float):
        with pytest.raises(UserError, match=r"tensor layer1\.relu"):
            HistogramObserver("layer1.relu")(torch.tensor([1.0, bad]))


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
            assert calibrate(model, batches, method, 99.0) == []
            assert (model.twice.amax, model.once.amax) == from_one_pass

    def test_all_calls_of_a_quantizer_share_a_histogram(self, batches: list[Tensor]):
        model = Net()
        observers = observe(model, batches)
        assert observers["twice"].counts.sum() == 2 * 40 * 8
        calibrate(model, batches, "max")
        assert model.twice.amax == 3 * torch.cat(batches).abs().max()

    def test_it_observes_the_float_network_in_eval_mode(self, batches: list[Tensor]):
        model = Net()
        calibrate(model, batches, "max")
        x = torch.cat(batches)
        norm = (x - 3 * x) / math.sqrt(1 + model.norm.eps)  # the initial running mean and variance, 0 and 1
        torch.testing.assert_close(model.once.amax, (norm @ model.weight.T).relu().max().detach())
        assert model.norm.num_batches_tracked == 0

    @pytest.mark.parametrize("method", METHODS)
    def test_no_method_clips_above_the_exact_max(self, batches: list[Tensor], method: Method):
        model = Net()
        observers = observe(model, batches)
        set_ranges(model, observers, method)
        assert 0 < model.twice.amax <= observers["twice"].amax
        assert model(batches[0]).isfinite().all()

    def test_an_all_zero_tensor_warns_and_its_scale_is_floored(self, batches: list[Tensor]):
        for method in METHODS:
            model = Net()
            nn.init.zeros_(model.weight)
            (warning,) = calibrate(model, batches, method)
            assert "once is zero" in warning
            assert model.once.amax == 0
            assert torch.equal(model(batches[0]), torch.zeros(16, 8))

    def test_a_tensor_that_no_batch_reaches_warns(self, batches: list[Tensor]):
        model = Net()
        model.auxiliary = ActivationQuantizer()
        (warning,) = calibrate(model, batches, "max")
        assert "auxiliary was not computed" in warning
        assert model.auxiliary.amax.isnan()

    def test_no_batch_is_a_users_mistake(self):
        with pytest.raises(UserError, match="no images"):
            calibrate(Net(), [], "max")

    def test_an_unknown_method_lists_those_that_exist(self, batches: list[Tensor]):
        with pytest.raises(ValueError, match="choose max, percentile, mse or entropy"):
            calibrate(Net(), batches, "average")  # type: ignore[arg-type]

    def test_nan_names_the_tensor_and_every_mode_is_restored(self, batches: list[Tensor]):
        model = Net().train()
        model.norm.eval()
        model.extra = WeightQuantizer(axis=0)
        model.extra.enabled = False
        batches[1][0, 0] = math.nan
        with pytest.raises(UserError, match="tensor twice"):
            calibrate(model, batches, "entropy")
        assert model.training
        assert not model.norm.training
        assert model.weight_quantizer.enabled
        assert not model.extra.enabled
        assert model.twice.observer is None
        assert model.twice.training
        assert model.state_dict().keys() == Net().state_dict().keys()

    def test_progress_is_told_after_every_batch(self, batches: list[Tensor]):
        calls = []
        calibrate(Net(), iter(batches), "max", on_batch=lambda: calls.append(1))
        assert len(calls) == len(batches)

    def test_no_gradient_is_recorded(self, batches: list[Tensor]):
        model = Net()
        calibrate(model, batches, "mse")
        assert model.weight.grad is None
        assert not model.twice.amax.requires_grad
