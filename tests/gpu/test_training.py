"""Training on a GPU: what is computed there is what the CPU computes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from qat.artifact import UserError  # noqa: E402
from qat.calibration import choose_ranges  # noqa: E402
from qat.data import batches as batches_of  # noqa: E402
from qat.data import load_data  # noqa: E402
from qat.histogram import BINS, HistogramObserver, check_finite  # noqa: E402


def batches(scale: float = 1.0) -> list[torch.Tensor]:
    """Of every size that kernels treat differently, zeros first, growing."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 31, 1025, 70_001, 3_000_000)
    normal = [scale * 3**index * torch.randn(size, generator=generator) for index, size in enumerate(sizes)]
    return [torch.zeros(5), *normal, normal[-1].relu(), torch.zeros(10_000)]


def observed(on: str, tensors: list[torch.Tensor]) -> HistogramObserver:
    observer = HistogramObserver("x").to(on)
    for x in tensors:
        observer(x.to(on))
    return observer


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_counts_are_those_of_the_cpu(scale: float):
    cpu, gpu = (observed(on, batches(scale)) for on in ("cpu", "cuda"))
    assert (gpu.amax, gpu.limit.item()) == (cpu.amax, cpu.limit.item())
    assert gpu.counts.sum() == cpu.counts.sum()
    # A value at the edge of two bins may fall into either one, by float32 rounding.
    off = (gpu.counts.cpu().cumsum(0) - cpu.counts.cumsum(0)).abs()
    assert off.max() <= 2e-5 * cpu.counts.sum()
    for method in ("max", "percentile", "mse", "entropy"):
        (one,), (other,) = choose_ranges([cpu], method), choose_ranges([gpu], method)
        assert one == pytest.approx(other, abs=3 * cpu.limit.item() / BINS)


def test_growth_by_more_than_all_bins():
    gpu = observed("cuda", [torch.full((7,), 1e-20), torch.tensor([3.0, 1e20])])
    assert gpu.counts[0] == 8
    assert gpu.counts.sum() == 9
    assert gpu.limit >= gpu.amax == pytest.approx(1e20)


def test_growth_merges_bins():
    x = torch.rand(5_000, generator=torch.Generator().manual_seed(2))
    x[0] = 1.0
    before, after = observed("cuda", [x]), observed("cuda", [x, torch.tensor([6.5])])
    assert after.limit == 8
    assert torch.equal(after.counts[: BINS // 8], before.counts.view(-1, 8).sum(dim=1))


def test_memory_layout_does_not_matter():
    x = torch.randn(2, 6, 5, 4)
    views = (x.to(memory_format=torch.channels_last), x.permute(2, 0, 3, 1), x[:, ::2, 1:])
    for view in views:
        assert torch.equal(observed("cuda", [view]).counts, observed("cuda", [view.contiguous()]).counts)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_the_tensor(bad: float):
    with pytest.raises(UserError, match="in tensor x"):
        check_finite([observed("cuda", [torch.ones(3), torch.tensor([1.0, bad])])])


def test_images_in_the_memory_of_the_gpu_make_the_same_batches(tmp_path: Path):
    random = np.random.default_rng(0)
    arrays = {
        f"{split}_images": random.integers(0, 256, (90, 32, 32, 3), dtype=np.uint8) for split in ("train", "test")
    }
    np.savez(tmp_path / "data.npz", **arrays, train_labels=np.arange(90) % 3, test_labels=np.arange(90) % 3)
    data = load_data(str(tmp_path / "data.npz"), None, 0)
    moved = data.on(torch.device("cuda"))
    for split in ("train", "test"):
        ours, theirs = (batches_of(getattr(one, split), 16, 5, epoch=1) for one in (data, moved))
        for (x, labels), (moved_x, moved_labels) in zip(ours, theirs, strict=True):
            assert moved_x.is_cuda
            assert moved_labels.is_cuda
            assert x.is_pinned()
            assert torch.equal(x, moved_x.cpu())
            assert torch.equal(labels, moved_labels.cpu())
