"""What calibration keeps of a tensor: exact counts, whatever the order, type and layout of what comes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.base.errors import UserError
from qat.calibration import histogram
from qat.calibration.histogram import BINS, HistogramObserver, check_finite


def observed(*batches: Tensor, name: str = "x") -> HistogramObserver:
    observer = HistogramObserver(name)
    for batch in batches:
        observer(batch)
    return observer


def test_counts_are_numpys():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    observer = observed(x)
    assert observer.limit == observer.amax == x.abs().max()
    expected = np.histogram(x.abs().double().numpy(), BINS, (0, observer.limit.item()))[0]
    assert observer.counts.sum() == 10_000
    # A value at the edge of two bins may fall into either one, by float32 rounding.
    assert np.abs(np.cumsum(expected) - observer.counts.cumsum(0).numpy()).max() <= 1


def test_growth_merges_bins_and_keeps_every_count():
    x = torch.rand(5_000, generator=torch.Generator().manual_seed(2))
    x[0] = 1.0
    before, after = observed(x), observed(x, torch.tensor([6.5]))
    assert (after.limit, after.amax) == (8.0, 6.5)
    assert torch.equal(after.counts[: BINS // 8], before.counts.view(-1, 8).sum(dim=1))
    assert after.counts[int(6.5 / 8 * BINS)] == 1
    assert after.counts.sum() == 5_001


def test_growth_by_more_than_all_bins():
    observer = observed(torch.full((7,), 1e-20), torch.tensor([3.0, 1e20]))
    assert observer.counts[0] == 8
    assert observer.counts.sum() == 9
    assert observer.limit >= observer.amax == pytest.approx(1e20)


def test_zeros_before_the_first_value():
    observer = observed(torch.zeros(5), torch.tensor([2.0, 0.0]))
    assert observer.counts[0] == 6
    assert observer.counts[-1] == 1
    assert (observer.limit, observer.amax) == (2.0, 2.0)


def test_order_of_batches_keeps_the_total():
    batches = [torch.randn(1000, generator=torch.Generator().manual_seed(s)) * 3**s for s in range(5)]
    for order in (batches, batches[::-1]):
        assert observed(*order).counts.sum() == 5000
        assert observed(*order).amax == max(b.abs().max() for b in batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_count_as_float32(dtype: torch.dtype):
    x = torch.randn(70_000, generator=torch.Generator().manual_seed(3)).to(dtype)
    observer, reference = observed(x), observed(x.float())
    assert torch.equal(observer.counts, reference.counts)
    assert observer.amax == reference.amax


def test_memory_layout_does_not_matter():
    x = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(4))
    reference = observed(x)
    layouts = (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x.permute(2, 0, 3, 1))
    for view in layouts:
        assert torch.equal(observed(view).counts, reference.counts)
    assert observed(x[:, ::2, 1:]).counts.sum() == 2 * 3 * 4 * 4
    assert observed(torch.ones(1, 3).expand(4, 3)).counts.sum() == 12
    assert observed(torch.tensor(2.0)).counts[-1] == 1


def test_dense_layouts_are_not_copied():
    x = torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last)
    assert histogram._flatten(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("where", [(..., slice(None, None, 2)), (..., 0), (slice(None), 0)])
def test_layouts_with_gaps_are_copied(where: tuple[slice | int, ...]):
    view = torch.randn(2, 3, 4, 6)[where]
    flat = histogram._flatten(view)
    assert flat.is_contiguous()  # or the kernels of a GPU would read what lies in the gaps
    assert torch.equal(flat.sort().values, view.flatten().sort().values)


def test_more_counts_than_float32_holds():
    observer = observed(torch.ones(1), torch.zeros(2**24 + 5), torch.zeros(2))
    assert observer.counts[0] == 2**24 + 7


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_the_tensor(bad: float):
    with pytest.raises(UserError, match=r"tensor layer1\.relu"):
        check_finite([observed(torch.ones(3)), observed(torch.ones(1), torch.tensor([1.0, bad]), name="layer1.relu")])


def test_nothing_observed_is_finite_and_has_no_range():
    check_finite([])
    check_finite([HistogramObserver("x")])
    assert math.isnan(HistogramObserver("x").amax)
