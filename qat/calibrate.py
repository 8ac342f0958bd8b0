"""Calibration: the amax of every activation tensor, by one of four methods, from one pass over the images.

The pass runs the float network. For each ActivationQuantizer it keeps the exact max |x| and a histogram of
|x|, whose size does not depend on the number of images:

    counts[j] = how many |x| lie in [j, j + 1) * limit / B        j = 0 .. B-1, B = 2048

``limit`` starts as the max of the first batch; when a larger value comes it doubles and adjacent bins merge,
so that no count is lost. The quantizer then clips at amax = i * limit / B, where i is chosen by

    max         nothing is clipped: amax is the exact max |x|
    percentile  the least i with  counts[0] + .. + counts[i-1] >= percentile / 100 * sum(counts)
    mse         the i of the least  sum_j counts[j] * (x_j - fake_quantize(x_j))^2,  x_j the center of bin j
    entropy     the i of the least  KL(P, Q) = sum_j p_j log(p_j / q_j),  P: clipped at i, Q: on 128 levels

and amax never exceeds the exact max. For mse and entropy i runs from 128 (fewer bins than codes cannot tell
what rounding costs) to the end of the last bin that is not empty (more clips nothing).

Entropy is TensorRT's procedure (S. Migacz, "8-bit Inference with TensorRT", GTC 2017). With
c = counts / sum(counts):

    P    p_j = c_j for j < i; p_{i-1} also gets the clipped mass c_i + .. + c_{B-1}
    Q    the bins j < i form 128 groups, group k being floor(k*i/128) <= j < floor((k+1)*i/128).
         S_k is the sum of c over group k, without the clipped mass; n_k counts its bins with p_j > 0;
         q_j = S_k / n_k / (S_0 + .. + S_127) where p_j > 0, else 0
    KL   = sum_j p_j log p_j  -  sum_k T_k log(S_k / n_k)  +  log(sum_k S_k),    T_k the sum of p over group k

so that prefix sums of c, c log c and [c > 0], read at 129 edges for each i, give it without a loop over i, j.
- A last bin filled by clipped mass only counts in n_127. If its whole group is otherwise empty, q = 0 where
  p > 0: KL is infinite and this i is not chosen. The largest i clips nothing, so one KL at least is finite.
- Of equal minima the largest i wins: it clips least.
- The zeros that a ReLU makes all fall into bin 0. INT8 has an exact code for them, but Q would smear them
  over group 0, and only a small i, which clips nearly everything, would avoid that. So counts[0] is lowered
  to counts[1]. Measured on 4 million of max(0, gaussian): SQNR 39.4 dB instead of 17.0 dB with the zeros
  kept; a signed gaussian, which has no such spike, gets 39.5 dB either way.

MSE is read from prefix sums in the same way: the bins that share code k are neighbours, and with the scale
s = amax / 127 their error is  sum c x^2 - 2 k s sum c x + (k s)^2 sum c.

Legend: B bins, T candidates i, K = 128 groups or codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from qat.artifact import UserError
from qat.quantizer import (
    ACTIVATION,
    SCALE_FLOOR,
    WEIGHT,
    ActivationQuantizer,
    WeightQuantizer,
    quantize,
    scale_from_amax,
    weight_amax,
)

Method = Literal["max", "percentile", "mse", "entropy"]

BINS = 2048
LEVELS = ACTIVATION.high + 1  # the codes 0 .. 127 that |x| can take
# torch.histc counts in float32, which is exact up to 2**24: larger tensors are counted piece by piece.
EXACT_COUNT = 2**24
# The limit may double above the largest |x| and a bin's width must stay a normal float.
LARGEST, SMALLEST_LIMIT = torch.finfo(torch.float32).max / 2, BINS * SCALE_FLOOR


class HistogramObserver(nn.Module):
    """Streaming histogram of |x| and exact max |x| of one activation tensor.

    Attributes:
        counts: [BINS], int64, on the device of the model.
        limit: upper edge of the last bin; 0 until a value other than zero was seen.
        amax: the exact max |x|; NaN until a tensor was seen.
    """

    counts: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.limit = 0.0
        self.amax = math.nan
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> None:
        """Counts ``x``: any shape, memory layout and floating-point type.

        Raises UserError, naming the tensor, when ``x`` holds NaN or infinity.
        """
        x = _flat(x.detach()).float()
        low, high = torch.stack(torch.aminmax(x)).tolist()
        largest = max(-low, high)
        if not largest <= LARGEST:  # also when it is NaN
            raise UserError(
                f"calibration found {largest} in tensor {self.name}: "
                "check the images, their normalization and the weights"
            )
        self.amax = largest if math.isnan(self.amax) else max(self.amax, largest)
        self._grow(largest)
        for part in x.split(EXACT_COUNT):
            self._count(part if low >= 0 else part.abs())

    def _count(self, magnitudes: Tensor) -> None:
        if self.limit == 0:
            self.counts[0] += magnitudes.numel()
        else:
            self.counts += torch.histc(magnitudes, BINS, 0, self.limit).long()

    def _grow(self, largest: float) -> None:
        if self.limit == 0:
            self.limit = max(largest, SMALLEST_LIMIT) if largest > 0 else 0.0
        while self.limit < largest:
            merged = self.counts.view(-1, 2).sum(dim=1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.limit *= 2


def amax_percentile(counts: Tensor, limit: float, percentile: float = 99.99) -> float:
    """The amax that at least ``percentile`` % of all |x| do not exceed, rounded up to the edge of a bin.

    Args:
        counts: [B], int64, at least one count; the histogram of |x| over [0, ``limit``].
        limit: upper edge of the last bin, in the unit of x.
        percentile: in (0, 100]; otherwise a UserError is raised.
    """
    if not 0 < percentile <= 100:
        raise UserError(f"the percentile is {percentile}: choose one above 0 and up to 100, such as 99.99")
    cumulative = counts.cumsum(0).double()
    below = int((cumulative < percentile / 100 * cumulative[-1]).sum())
    return (below + 1) * limit / len(counts)


def amax_mse(counts: Tensor, limit: float) -> float:
    """The amax with the least mean squared error of the INT8 codes.

    Args:
        counts: [B], int64, B >= 128, at least one count; the histogram of |x| over [0, ``limit``].
        limit: upper edge of the last bin, in the unit of x.
    """
    return _best_threshold(mse_of_thresholds(counts)) * limit / len(counts)


def amax_entropy(counts: Tensor, limit: float) -> float:
    """The amax with the least Kullback-Leibler divergence from the clipped distribution to its 128 levels.

    Args:
        counts: [B], int64, B >= 128; the histogram of |x| over [0, ``limit``].
        limit: upper edge of the last bin, in the unit of x.
    """
    without_zeros = counts.clone()
    without_zeros[0] = torch.minimum(counts[0], counts[1])
    return _best_threshold(kl_of_thresholds(without_zeros)) * limit / len(counts)


def mse_of_thresholds(counts: Tensor) -> Tensor:
    """Mean squared error of the codes, in squared bin widths, when amax is i bins: [B] to [T], float64."""
    bins = len(counts)
    c = counts.double() / counts.sum()
    x = torch.arange(bins, device=c.device, dtype=torch.float64) + 0.5
    end = _end(counts)
    edges = _code_edges(bins, c.device)[: end - LEVELS + 1]
    scale = torch.arange(LEVELS, end + 1, device=c.device, dtype=torch.float64) / ACTIVATION.high  # [T]
    mass, first = (_sums(_prefix(moment), edges) for moment in (c, c * x))  # [T, K]
    levels = torch.arange(LEVELS, device=c.device) * scale[:, None]  # [T, K]
    return (c * x * x).sum() + torch.linalg.vecdot(levels, levels * mass - 2 * first)


def kl_of_thresholds(counts: Tensor) -> Tensor:
    """KL(P, Q) in nats when amax is i bins: [B] to [T], float64; see the top of this file.

    Infinite where Q cannot represent P, and everywhere when there are no counts.
    """
    end = _end(counts)
    edges = _group_edges(len(counts), counts.device)[: end - LEVELS + 1]
    total = counts.sum().clamp(min=1)
    c = counts.double() / total
    prefix = _prefix(counts).double() / total  # of integers: no rounding makes an empty group look filled
    c_last = c[LEVELS - 1 : end]  # c_{i-1}: [T]
    kept = prefix[LEVELS : end + 1]  # c_0 + .. + c_{i-1}: [T]
    clipped = prefix[-1] - kept
    clips = clipped > 0

    group_mass = _sums(prefix, edges)  # S_k: [T, K]
    filled = _sums(_prefix((c > 0).double()), edges)  # n_k
    filled[:, -1] += (c_last == 0) & clips
    # An empty group gets the log of an arbitrary value above 0, which its mass of 0 then cancels.
    log_q = group_mass.clamp(min=SCALE_FLOOR).div_(filled.clamp_(min=1)).log_()
    p_log_q = torch.linalg.vecdot(group_mass, log_q) + clipped * log_q[:, -1] - kept.log()
    p_last = c_last + clipped
    p_log_p = _prefix(torch.xlogy(c, c))[LEVELS - 1 : end] + torch.xlogy(p_last, p_last)
    impossible = (kept == 0) | (clips & (group_mass[:, -1] == 0))
    return torch.where(impossible, math.inf, p_log_p - p_log_q)


def weight_amax_mse(weight: Tensor, axis: int, candidates: int = 100) -> Tensor:
    """The range of each channel of ``axis`` with the least mean squared error of the codes: [C], float32.

    Tried are ``candidates`` equal steps up to the largest magnitude; of equal errors the largest range is taken.
    """
    rows = weight.detach().transpose(0, axis).flatten(1).float()  # [C, K]
    largest = weight_amax(weight, axis)  # [C]
    best, least = largest.clone(), torch.full_like(largest, math.inf)
    for step in range(candidates, 0, -1):
        amax = largest * (step / candidates)
        scale = scale_from_amax(amax)[:, None]
        error = (quantize(rows, scale, WEIGHT) * scale - rows).square().mean(1)
        best, least = torch.where(error < least, amax, best), torch.minimum(error, least)
    return best


def observe(
    model: nn.Module, batches: Iterable[Tensor], on_batch: Callable[[], None] | None = None
) -> dict[str, HistogramObserver]:
    """Runs the float network in eval mode and watches the input of every ActivationQuantizer.

    Args:
        model: contains ActivationQuantizers; a quantizer that is called several times sees all of its inputs.
        batches: what ``model`` takes, on any device.
        on_batch: called after every batch, to show progress.

    Returns the observers by the quantizers' names, from which ``set_ranges`` can choose with any method.
    Modes and enabled weight quantizers are afterwards as they were, also after an exception.
    Raises UserError when there is no batch, or a tensor holds NaN or infinity.
    """
    quantizers = _quantizers(model)
    observers = {name: HistogramObserver(name).to(q.amax.device) for name, q in quantizers.items()}
    device = next(model.parameters()).device
    empty = True
    with _observing(model, observers), torch.no_grad():
        for batch in batches:
            model(batch.to(device))
            empty = False
            if on_batch is not None:
                on_batch()
    if empty:
        raise UserError("calibration got no images: give a calibration split of at least one batch")
    return observers


def set_ranges(
    model: nn.Module, observers: Mapping[str, HistogramObserver], method: Method, percentile: float = 99.99
) -> list[str]:
    """Writes the amax of every ActivationQuantizer, chosen by ``method`` from what ``observers`` saw.

    Returns one line of warning for each tensor that was constant zero (its amax becomes 0 and its scale the
    floor) or that no batch reached (its amax stays as it was).
    """
    warnings = []
    for name, quantizer in _quantizers(model).items():
        observer = observers[name]
        if math.isnan(observer.amax):
            warnings.append(f"tensor {name} was not computed by any calibration batch: it has no range")
            continue
        quantizer.amax.fill_(choose_amax(observer, method, percentile))
        if observer.amax / ACTIVATION.high < SCALE_FLOOR:
            warnings.append(f"tensor {name} is zero for every calibration image: dead channels, or too few images?")
    return warnings


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    method: Method,
    percentile: float = 99.99,
    on_batch: Callable[[], None] | None = None,
) -> list[str]:
    """Sets the amax of every ActivationQuantizer of ``model`` from one pass over ``batches``.

    See ``observe`` for the arguments and errors, and ``set_ranges`` for the warnings that are returned;
    ``percentile`` in (0, 100] is used by the method of that name.
    """
    return set_ranges(model, observe(model, batches, on_batch), method, percentile)


def choose_amax(observer: HistogramObserver, method: Method, percentile: float) -> float:
    """The amax that ``method`` chooses from what ``observer`` saw; never above the exact max."""
    if method == "max" or observer.limit == 0:
        return observer.amax
    if method == "percentile":
        amax = amax_percentile(observer.counts, observer.limit, percentile)
    elif method == "mse":
        amax = amax_mse(observer.counts, observer.limit)
    elif method == "entropy":
        amax = amax_entropy(observer.counts, observer.limit)
    else:
        raise ValueError(f"no calibration method {method!r}: choose max, percentile, mse or entropy")
    return min(amax, observer.amax)


def _quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)}


@contextmanager
def _observing(model: nn.Module, observers: Mapping[str, HistogramObserver]) -> Iterator[None]:
    """The float network in eval mode with its observers set; everything is put back at the end."""
    quantizers = _quantizers(model)
    training = {module: module.training for module in model.modules()}
    enabled = {module: module.enabled for module in training if isinstance(module, WeightQuantizer)}
    try:
        model.eval()
        for weight_quantizer in enabled:
            weight_quantizer.enabled = False
        for name, quantizer in quantizers.items():
            quantizer.observer = observers[name]
        yield
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
        for weight_quantizer, was in enabled.items():
            weight_quantizer.enabled = was
        for module, was in training.items():
            module.training = was


def _flat(x: Tensor) -> Tensor:
    """All elements of ``x``, in the order of memory: no copy for channels_last and other dense layouts."""
    return x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).reshape(-1)


def _best_threshold(cost: Tensor) -> int:
    """The i of the least of ``cost`` [T], and of equal ones the largest."""
    return LEVELS + int((cost == cost.min()).nonzero()[-1])


def _prefix(values: Tensor) -> Tensor:
    """[B] to [B+1]: element i is the sum of the values below i."""
    return nn.functional.pad(values.cumsum(0), (1, 0))


def _sums(prefix: Tensor, edges: Tensor) -> Tensor:
    """Sums between neighbouring edges: prefix sums [B+1] and edges [T, K+1] to [T, K]."""
    return prefix.index_select(0, edges.flatten()).view(edges.shape).diff(dim=1)


def _end(counts: Tensor) -> int:
    """The largest i: the end of the last bin that is not empty, above which nothing is clipped; at least 128."""
    filled = counts.nonzero()
    return max(LEVELS, int(filled[-1]) + 1) if len(filled) else LEVELS


@lru_cache(maxsize=4)
def _group_edges(bins: int, device: torch.device) -> Tensor:
    """[B-127, K+1]: floor(k * i / 128) for i = 128 .. B."""
    i = torch.arange(LEVELS, bins + 1, device=device)[:, None]
    return (torch.arange(LEVELS + 1, device=device) * i // LEVELS).int()


@lru_cache(maxsize=4)
def _code_edges(bins: int, device: torch.device) -> Tensor:
    """[B-127, K+1]: the first bin whose center has code k or higher when amax is i bins, for i = 128 .. B.

    The center j + 1/2 reaches code k where (j + 1/2) * 127 / i >= k - 1/2. A tie has the same error on both
    sides. The last code, 127, extends to bin B.
    """
    i = torch.arange(LEVELS, bins + 1, device=device)[:, None]
    edges = ((torch.arange(LEVELS + 1, device=device) - 0.5) * i / ACTIVATION.high - 0.5).ceil().int()
    edges[:, 0], edges[:, -1] = 0, bins
    return edges
