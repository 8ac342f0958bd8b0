"""Chooses the range of a tensor from the histogram of its magnitudes, by one of three methods.

counts[j] is the number of |x| in [j, j + 1) * limit / B, for j = 0 .. B-1. The quantizer clips at
amax = i * limit / B, where i is chosen by

    percentile  the least i with  counts[0] + .. + counts[i-1] >= percentile / 100 * sum(counts)
    mse         the i with the least  sum_j counts[j] * (x_j - fake_quantize(x_j))^2,  x_j the center of bin j
    entropy     the i with the least  KL(P, Q) = sum_j p_j log(p_j / q_j),  P: clipped at i, Q: on 128 levels

(The fourth method, max, needs no histogram.) For mse and entropy, i runs from 128 (with fewer bins than codes the cost
of rounding is not visible) to the end of the last bin that is not empty (a larger i clips nothing). 128 is the number
of codes that |x| can have, 0 .. 127; a simulation of fewer bits has fewer (``levels``).

Entropy is TensorRT's procedure (S. Migacz, "8-bit Inference with TensorRT", GTC 2017) with two changes, Q's sum and
smoothing. With c = counts / sum(counts):

    P    p_j = c_j for j < i; p_{i-1} also gets the clipped mass c_i + .. + c_{B-1}
    Q    the bins j < i form 128 groups; group k is floor(k*i/128) <= j < floor((k+1)*i/128).
         S_k is the sum of c over group k, without the clipped mass; n_k counts its bins with p_j > 0;
         q_j = S_k / n_k where p_j > 0, else 0
    KL   = sum_j p_j log p_j  -  sum_k T_k log(S_k / n_k),    T_k the sum of p over group k

so prefix sums of c, c log c and [c > 0], read at 129 edges for each i, give KL without a loop over i and j.
- If the last bin has only clipped mass, it still counts in n_127. If its whole group is otherwise empty, then
  q = 0 where p > 0: KL is infinite and this i is not chosen. The largest i clips nothing, so at least one KL is finite.
- If several i have the same minimum, the largest is chosen: it clips least.
- Q is not divided by its sum: what is clipped is missing from it. Divided, Q would equal P wherever all filled bins but
  one are clipped. KL was 0 there, and the sigmoids that gate channels, none of them near zero, were clipped at the
  least of them: SQNR 3 to 5 dB in EfficientNet-B0; now 48 dB.
- The zeros that a ReLU makes all fall into bin 0. INT8 has an exact code for zero, but Q would smear these zeros
  over group 0, and only a small i, which clips nearly everything, would avoid that. So counts[0] is lowered
  to counts[1]. Measured on 4 million samples of max(0, gaussian): SQNR 39.3 dB; a signed gaussian, which has no
  such spike, gets 39.2 dB.
- Spikes elsewhere are smeared too, more or less as the edges fall: a channel of a depthwise convolution has one value,
  its bias, wherever a ReLU before it left only zeros under the kernel. Their part of KL outweighs that of clipping: in
  MobileNetV2 one tensor of ReLU6 was clipped at 4.2 (SQNR 24 dB, against 38 dB at 6), which alone took the logits from
  28.8 to 22.7 dB. So each count becomes the sum over the bins nearest to it, about as many as a code has when nothing
  is clipped (B / 128 + 1): clipping less cannot keep finer detail. Bins before the first are its mirror image; bins
  after the last filled one stay empty.
Both changes as measured, and what remains (tensors of squeeze-and-excitation): benchmarks/entropy_depthwise.txt.

MSE is linear in c. With step = i / 127, in bins, and k_ij the code of x_j, it is

    sum_j c_j x_j^2  -  2 step sum_j k_ij c_j x_j  +  step^2 sum_j k_ij^2 c_j

Legend: B bins, T candidates i, K = 128 groups or codes; "..." are further dimensions, one element for each tensor.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from qat.base.errors import UserError
from qat.base.number_format import INT8
from qat.fake_quantize.quantizer import SCALE_FLOOR

# Number of tensors that entropy processes together; each takes 2 MB in every table. On a CPU, as many as fit in its
# caches. On a GPU many more, because launching small operations takes longer than computing them.
_TOGETHER, _TOGETHER_ON_GPU = 4, 64
_ROUNDING = 1e-8  # relative; costs that differ by less count as equal


def amax_percentile(counts: Tensor, limit: Tensor | float, percentile: float = 99.99) -> Tensor:
    """The least bin edge that at least ``percentile`` % of all |x| do not exceed.

    Args:
        counts: [..., B], int64, with at least one count per tensor; histograms of |x| over [0, ``limit``].
        limit: [...], upper edges of the last bins, in the unit of x.
        percentile: in (0, 100]; otherwise a UserError is raised.

    Returns the amax [...], float64, like the other two methods.
    """
    if not 0 < percentile <= 100:
        raise UserError(f"percentile {percentile} is out of range: it must be above 0 and at most 100, such as 99.99")
    cumulative = counts.cumsum(-1).double()
    below = (cumulative < percentile / 100 * cumulative[..., -1:]).sum(-1)
    return (below + 1).double() * limit / counts.shape[-1]


def amax_mse(counts: Tensor, limit: Tensor | float, levels: int = INT8.levels) -> Tensor:
    """The amax with the least mean squared quantization error; arguments as in ``amax_percentile``, B >= levels."""
    return best_threshold(mse_of_thresholds(counts, levels), levels).double() * limit / counts.shape[-1]


def amax_entropy(counts: Tensor, limit: Tensor | float, levels: int = INT8.levels) -> Tensor:
    """The amax with the least Kullback-Leibler divergence of the clipped from the quantized distribution.

    Arguments as in ``amax_percentile``, B >= levels.
    """
    shape, together = counts.shape[:-1], _TOGETHER_ON_GPU if counts.is_cuda else _TOGETHER
    limits = torch.as_tensor(limit, dtype=torch.float64, device=counts.device).expand(shape).reshape(-1)
    chosen = []
    for part in zip(counts.reshape(-1, counts.shape[-1]).split(together), limits.split(together), strict=True):
        amax, divergence = entropy_of_thresholds(*part, levels)
        chosen.append(amax.gather(-1, best_threshold(divergence, levels)[:, None] - levels))
    return torch.cat(chosen).view(shape)


def entropy_of_thresholds(counts: Tensor, limit: Tensor | float, levels: int = INT8.levels) -> tuple[Tensor, Tensor]:
    """The amax of all candidates, in the unit of x, and the divergences from which entropy chooses: two [..., T].

    Arguments as in ``amax_entropy``. T and where divergences are infinite: see ``kl_of_thresholds``.
    """
    divergence = kl_of_thresholds(_smoothed(counts, levels), levels)
    i = torch.arange(levels, levels + divergence.shape[-1], dtype=torch.float64, device=counts.device)
    limits = torch.as_tensor(limit, dtype=torch.float64, device=counts.device)
    return (i * limits[..., None] / counts.shape[-1]).expand_as(divergence), divergence


def mse_of_thresholds(counts: Tensor, levels: int = INT8.levels) -> Tensor:
    """Mean squared quantization error in squared bin widths when amax is i bins: [..., B] to [..., T], float64.

    T is the number of candidates of the tensor that has most; other tensors have infinity beyond their own.
    """
    bins = counts.shape[-1]
    c = counts.double() / counts.sum(-1, keepdim=True)
    x = torch.arange(bins, device=c.device, dtype=torch.float64) + 0.5
    ends = _ends(counts, levels)
    i = torch.arange(levels, int(ends.max()) + 1, device=c.device)  # [T]
    step = i.double() / (levels - 1)
    codes = (x / step[:, None]).round_().clamp_(max=levels - 1)  # [T, B]
    products = (c * x) @ codes.T  # [..., T]
    errors = (c * x * x).sum(-1, keepdim=True) + step * (step * (c @ codes.square_().T) - 2 * products)
    return errors.masked_fill(i > ends, math.inf)


def kl_of_thresholds(counts: Tensor, levels: int = INT8.levels) -> Tensor:
    """KL(P, Q) in nats when amax is i bins: [..., B] to [..., T], float64; see the top of this file.

    T is the number of candidates of the tensor that has most. KL is infinite beyond a tensor's own candidates, where Q
    cannot represent P, and everywhere if there are no counts.
    """
    bins = counts.shape[-1]
    ends = _ends(counts, levels)
    end = int(ends.max())
    i = torch.arange(levels, end + 1, device=counts.device)  # [T]
    edges = _group_edges(bins, levels, counts.device)[: len(i)]
    total = counts.sum(-1, keepdim=True).clamp(min=1)
    c = counts.double() / total
    prefix = _prefix(counts).double() / total  # sums of integers: rounding cannot make an empty group look filled
    c_last = c[..., levels - 1 : end]  # c_{i-1}: [..., T]
    kept = prefix[..., levels : end + 1]  # c_0 + .. + c_{i-1}
    clipped = prefix[..., -1:] - kept
    clips = clipped > 0

    group_mass = _sums(prefix, edges)  # S_k: [T, K, ...]
    filled = _sums(_prefix((c > 0).float()), edges)  # n_k
    filled[:, -1] += ((c_last == 0) & clips).movedim(-1, 0)
    # An empty group gets the log of an arbitrary positive value; its mass of 0 then cancels it.
    log_q = group_mass.clamp(min=SCALE_FLOOR).div_(filled.clamp_(min=1)).log_()
    last_mass, last_log_q = (of_groups[:, -1].movedim(0, -1) for of_groups in (group_mass, log_q))
    p_log_q = (group_mass * log_q).sum(1).movedim(0, -1) + clipped * last_log_q
    p_last = c_last + clipped
    p_log_p = _prefix(torch.xlogy(c, c))[..., levels - 1 : end] + torch.xlogy(p_last, p_last)
    impossible = (kept == 0) | (clips & (last_mass == 0)) | (i > ends)
    return torch.where(impossible, math.inf, p_log_p - p_log_q)


def _smoothed(counts: Tensor, levels: int) -> Tensor:
    """What entropy sees of histograms: without the zeros of a ReLU and without spikes; [..., B] to the same, int64."""
    bins = counts.shape[-1]
    reach = bins // (2 * levels)
    without_zeros = counts.clone()
    without_zeros[..., 0] = torch.minimum(counts[..., 0], counts[..., 1])
    beyond = torch.zeros_like(without_zeros[..., :reach])
    prefix = _prefix(torch.cat([without_zeros[..., :reach].flip(-1), without_zeros, beyond], -1))
    sums = prefix[..., 2 * reach + 1 :] - prefix[..., :bins]
    return sums * (torch.arange(bins, device=counts.device) < _ends(without_zeros, 1))


def best_threshold(cost: Tensor, levels: int = INT8.levels) -> Tensor:
    """The i with the least ``cost`` [..., T], the largest i if several costs are equal: [...]."""
    least = cost.amin(-1, keepdim=True)
    equal = cost <= least + _ROUNDING * least.abs()
    return levels + cost.shape[-1] - 1 - equal.flip(-1).int().argmax(-1)


def _prefix(values: Tensor) -> Tensor:
    """[..., B] to [..., B+1]: element i is the sum of the values below i."""
    return nn.functional.pad(values.cumsum(-1), (1, 0))


def _sums(prefix: Tensor, edges: Tensor) -> Tensor:
    """Sums between neighbouring edges: prefix sums [..., B+1] and edges [T, K+1] to [T, K, ...].

    The dimension of tensors comes last, so that the values read for all of them are adjacent in memory.
    """
    read = prefix.movedim(-1, 0).contiguous().index_select(0, edges.flatten())
    return torch.unflatten(read, 0, edges.shape).diff(dim=1)


def _ends(counts: Tensor, levels: int) -> Tensor:
    """The largest i, at the end of the last bin that is not empty; a larger one clips nothing: [..., 1]."""
    ends = torch.arange(1, counts.shape[-1] + 1, device=counts.device)
    return ((counts > 0) * ends).amax(-1, keepdim=True).clamp(min=levels)


@lru_cache(maxsize=4)
def _group_edges(bins: int, levels: int, device: torch.device) -> Tensor:
    """[B-K+1, K+1]: floor(k * i / K) for i = K .. B."""
    i = torch.arange(levels, bins + 1, device=device)[:, None]
    return (torch.arange(levels + 1, device=device) * i // levels).int()
