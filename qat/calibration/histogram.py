"""What calibration records of a tensor: the exact max |x|, and a histogram of |x| whose size is fixed.

    counts[j] = number of |x| in [j, j + 1) * limit / B        j = 0 .. B-1, B = 2048

``limit`` starts as the max of the first batch. When a larger value comes, it doubles and adjacent bins merge, so no
count is lost. On a GPU nothing waits for a result: the kernels (qat/compute/histogram.cu) keep their decisions there,
and they mostly read a tensor only once, at the speed of the memory. torch.histc takes 7 times as long, and 75 times
after a ReLU (benchmarks/gpu_training_step.txt): it adds float32 numbers in shared memory, for which GPUs have no
instruction, and all zeros of a ReLU fall into the same bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from qat.base.console import warn
from qat.base.errors import UserError, one_line
from qat.compute.cuda_kernels import Kernels
from qat.fake_quantize.quantizer import SCALE_FLOOR

BINS = 2048
# torch.histc counts in float32, which is exact up to 2**24: larger tensors are counted in pieces.
EXACT_COUNT = 2**24
# The limit may be up to twice the largest |x|, and the width of a bin must be a normal float.
LARGEST, SMALLEST_LIMIT = torch.finfo(torch.float32).max / 2, BINS * SCALE_FLOOR

_THREADS, _BLOCKS_PER_PROCESSOR = 1024, 2
_WORDS_BEHIND_COUNTS = 3  # the rest of the kernels' State
_MOST = 2**30  # elements that the kernels count at a time
_CONSTANTS = f"""
#define BINS {BINS}
#define STATE_BYTES {8 * (BINS + _WORDS_BEHIND_COUNTS)}
#define THREADS {_THREADS}
#define BLOCKS_PER_PROCESSOR {_BLOCKS_PER_PROCESSOR}
#define LARGEST {LARGEST:.9e}f
#define SMALLEST_LIMIT {SMALLEST_LIMIT:.9e}f
"""


class HistogramObserver:
    """Streaming histogram of |x| and exact max |x| of one activation tensor.

    Attributes:
        counts: [BINS], int64, on ``device``.
        limit: [], float32: upper edge of the last bin; 0 until a nonzero value was seen.
        largest: [], float32: the exact max |x|.
        seen: whether any tensor was observed.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self.name, self.seen = name, False
        self.state = torch.zeros(BINS + _WORDS_BEHIND_COUNTS, dtype=torch.int64, device=device)
        self.counts = self.state[:BINS]
        self.limit, self.largest = self.state[BINS:].view(torch.float32)[:2]

    @property
    def amax(self) -> float:
        """The exact max |x|; NaN until a tensor was observed."""
        return self.largest.item() if self.seen else math.nan

    def __call__(self, x: Tensor) -> None:
        """Counts ``x`` of any shape, layout and floating-point type. Call ``check_finite`` before using the counts."""
        self.seen = True
        x = x.detach().float()
        if x.is_cuda and x.device == self.state.device and (kernels := _kernels(x.device)) is not None:
            for part in (x,) if x.is_contiguous() and x.numel() <= _MOST else torch.split(_flatten(x), _MOST):
                kernels.launch(part, part.numel(), self.state)
            return
        x = _flatten(x)
        low, high = torch.aminmax(x)
        torch.maximum(self.largest, torch.maximum(-low, high), out=self.largest)
        if self.largest <= LARGEST:  # not when it is NaN
            self.grow(self.largest.item())
            self._count(x if low >= 0 else x.abs())

    def start(self, largest: float) -> None:
        """Starts again from the limit ``largest``, which other processes use too; from the least limit if it is 0."""
        self.seen = False
        self.counts.zero_()
        self.largest.zero_()
        self.limit.fill_(max(largest, SMALLEST_LIMIT))

    def grow(self, largest: float) -> None:
        """Doubles the limit until it reaches ``largest``; if it was 0, sets it to ``largest``."""
        limit = self.limit.item()
        if limit == 0 and largest > 0:
            limit = max(largest, SMALLEST_LIMIT)
        while limit < largest:
            merged = self.counts.view(-1, 2).sum(dim=1)
            self.counts.copy_(torch.cat([merged, torch.zeros_like(merged)]))
            limit *= 2
        self.limit.fill_(limit)

    def _count(self, magnitudes: Tensor) -> None:
        limit = self.limit.item()
        if limit == 0:
            self.counts[0] += magnitudes.numel()
            return
        for part in torch.split(magnitudes, EXACT_COUNT):
            self.counts += torch.histc(part, BINS, 0, limit).long()


def largest_of(observers: Sequence[HistogramObserver]) -> list[float]:
    """The exact max |x| of each tensor. Waits for the GPU once."""
    found: list[float] = torch.stack([observer.largest for observer in observers]).tolist() if observers else []
    return found


def check_finite(observers: Iterable[HistogramObserver]) -> None:
    """Raises UserError naming the first tensor that held NaN or infinity. Waits for the GPU once."""
    observers = list(observers)
    for observer, largest in zip(observers, largest_of(observers), strict=True):
        if not largest <= LARGEST:  # also when it is NaN
            raise UserError(
                f"calibration found {largest} in tensor {observer.name}: "
                "check the images, their normalization and the weights"
            )


def _flatten(x: Tensor) -> Tensor:
    """The elements of ``x`` contiguous in memory, in any order; not copied if they are, as in channels_last."""
    return x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).reshape(-1).contiguous()


@lru_cache(maxsize=16)
def _kernels(device: torch.device) -> Kernels | None:
    """The kernels, or None if they cannot be compiled: torch.histc is used then (Triton's takes 10 times as long)."""
    try:
        return Kernels("histogram.cu", _CONSTANTS, ["count", "count_rest"], device, _THREADS, _BLOCKS_PER_PROCESSOR)
    except (OSError, RuntimeError) as error:
        warn(f"calibration is slower than it could be: its CUDA kernels cannot be used ({one_line(error)})")
        return None
