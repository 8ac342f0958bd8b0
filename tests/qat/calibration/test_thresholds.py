"""The choice of a range against a NumPy oracle: the formulas of qat/calibration/thresholds.py, loop by loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from qat.base.errors import UserError
from qat.calibration import thresholds
from qat.calibration.histogram import BINS, HistogramObserver
from qat.fake_quantize.quantizer import fake_quantize, scale_from_amax


def candidates(counts: np.ndarray) -> range:
    return range(128, max(128, int(np.flatnonzero(counts).max()) + 1) + 1)


def oracle_kl(counts: np.ndarray) -> list[float]:
    divergences, total = [], counts.sum()
    for i in candidates(counts):
        p = counts[:i].astype(float)
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        for k in range(128):
            group = slice(k * i // 128, (k + 1) * i // 128)
            filled = p[group] > 0
            if filled.any():
                q[group][filled] = counts[group].sum() / filled.sum()
        divergences.append(scipy.special.rel_entr(p / total, q / total).sum())  # q is not normalized
    return divergences


def oracle_smoothed(counts: np.ndarray) -> np.ndarray:
    counts = counts.copy()
    counts[0] = min(counts[0], counts[1])
    end, reach = np.flatnonzero(counts).max() + 1, len(counts) // 256
    padded = np.concatenate([counts[:reach][::-1], counts, np.zeros(reach, counts.dtype)])
    sums = np.convolve(padded, np.ones(2 * reach + 1, counts.dtype), "valid")
    sums[end:] = 0
    return sums


def oracle_mse(counts: np.ndarray) -> list[float]:
    x = np.arange(len(counts)) + 0.5
    errors = []
    for i in candidates(counts):
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


def sqnr_db(x: Tensor, amax: Tensor) -> float:
    error = fake_quantize(x, scale_from_amax(amax)) - x
    return 10 * math.log10(x.double().square().sum() / error.double().square().sum())


def observed(*batches: Tensor) -> HistogramObserver:
    observer = HistogramObserver("x")
    for batch in batches:
        observer(batch)
    return observer


@pytest.mark.parametrize("bins", [128, 300, pytest.param(BINS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_kl_is_the_oracles_for_every_threshold(kind: str, bins: int):
    counts = histogram(kind, bins)
    found = thresholds.kl_of_thresholds(torch.tensor(counts)).numpy()
    np.testing.assert_allclose(found, oracle_kl(counts), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bins", [128, 300, BINS])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_the_oracles_for_every_threshold(kind: str, bins: int):
    counts = histogram(kind, bins)
    found = thresholds.mse_of_thresholds(torch.tensor(counts)).numpy()
    np.testing.assert_allclose(found, oracle_mse(counts), rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_amax_is_at_the_oracles_minimum(kind: str):
    counts = histogram(kind, BINS)
    limit, tensor = 7.5, torch.tensor(counts)
    assert thresholds.amax_mse(tensor, limit) == (128 + np.argmin(oracle_mse(counts))) * limit / BINS
    expected = (128 + np.argmin(oracle_kl(oracle_smoothed(counts)))) * limit / BINS
    assert thresholds.amax_entropy(tensor, limit) == pytest.approx(expected, rel=1e-12)


def test_clipped_mass_in_an_empty_group_is_infinitely_bad():
    counts = torch.zeros(512, dtype=torch.int64)
    counts[:100], counts[500] = 10, 1
    kl = thresholds.kl_of_thresholds(counts)
    assert not kl.isnan().any()
    assert kl[:100].isinf().all()
    assert kl[-1].isfinite()


def test_of_equal_minima_the_largest_threshold_is_chosen():
    counts = torch.zeros(256, dtype=torch.int64)
    counts[255] = 5  # one filled bin: clipping below it is impossible, and at its end exact
    assert thresholds.amax_entropy(counts, 1.0) == 1.0
    assert thresholds.best_threshold(torch.tensor([1.0, 0.5, 0.5, 2.0])) == 128 + 2


@pytest.mark.parametrize("many", [10, 777, 1000, 10**6])
def test_rounding_does_not_decide_between_equal_minima(many: int):
    counts = torch.zeros(2048, dtype=torch.int64)
    counts[0], counts[-1] = many, 9  # zeros and the largest value: its code is as exact with one bin less
    errors = thresholds.mse_of_thresholds(counts)
    assert errors[-2] == pytest.approx(errors[-1].item(), rel=1e-8)
    assert thresholds.amax_mse(counts, 1.0) == 1.0


@pytest.mark.parametrize("percentile", [0.01, 50, 99, 99.99, 100])
def test_percentile_is_numpys_to_one_bin(percentile: float):
    x = np.abs(np.random.default_rng(0).normal(size=100_000)).astype(np.float32)
    observer = observed(torch.from_numpy(x))
    found = thresholds.amax_percentile(observer.counts, observer.limit, percentile)
    exact = np.percentile(x, percentile, method="inverted_cdf")
    assert exact <= found * (1 + 1e-6)
    assert found <= exact + 1.001 * observer.limit / BINS


@pytest.mark.parametrize("percentile", [0, -1, 100.1, math.nan])
def test_an_impossible_percentile_is_refused(percentile: float):
    with pytest.raises(UserError, match=r"percentile.*must be above 0"):
        thresholds.amax_percentile(torch.ones(BINS, dtype=torch.int64), 1.0, percentile)


@pytest.mark.parametrize("function", [thresholds.amax_mse, thresholds.amax_entropy])
def test_the_zeros_of_a_relu_do_not_narrow_the_range(function: Callable[..., Tensor]):
    gaussian = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    for x in (gaussian, gaussian.relu()):
        observer = observed(x)
        assert sqnr_db(x, thresholds.amax_mse(observer.counts, observer.limit)) > 40.4  # the best for a gaussian
        assert sqnr_db(x, function(observer.counts, observer.limit)) > 39


def test_values_far_from_zero_are_not_clipped():
    # A sigmoid that gates channels: clipped to its least value, P would equal a Q that is divided by its sum.
    gate = torch.sigmoid(0.3 * torch.randn(8_000, generator=torch.Generator().manual_seed(0)))
    observer = observed(gate)
    amax = thresholds.amax_entropy(observer.counts, observer.limit)
    assert sqnr_db(gate, amax) > sqnr_db(gate, gate.max()) - 1


def test_spikes_of_a_depthwise_convolution_do_not_narrow_the_range():
    # A depthwise ReLU6 whose channels have one value where all inputs under the kernel are zero: spikes anywhere.
    generator = torch.Generator().manual_seed(0)
    varied = (1.5 * torch.randn(32, 20_000, generator=generator)).clamp(0, 6)
    without_input = (0.3 + 0.7 * torch.rand(32, 1, generator=generator)).expand(32, 10_000)
    x = torch.cat([varied, without_input], 1)
    observer = observed(x)
    best = sqnr_db(x, thresholds.amax_mse(observer.counts, observer.limit))
    assert sqnr_db(x, thresholds.amax_entropy(observer.counts, observer.limit)) > best - 3


@pytest.mark.parametrize("function", [thresholds.amax_percentile, thresholds.amax_mse, thresholds.amax_entropy])
def test_several_tensors_at_once_get_what_each_gets_alone(function: Callable[..., Tensor]):
    counts = torch.stack([torch.tensor(histogram(kind, BINS)) for kind in KINDS])
    limits = torch.arange(1.0, len(KINDS) + 1)
    alone = [function(row, limit) for row, limit in zip(counts, limits, strict=True)]
    assert torch.equal(function(counts, limits), torch.stack(alone))
