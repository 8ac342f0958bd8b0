"""Explains the range of a tensor: its histogram, what each candidate costs, and what each of the methods chooses.

Everything comes from what calibration itself uses: the histograms of its one pass over the images, the costs in
qat/calibration/thresholds.py and the choices of qat.calibration.activation_ranges.choose_ranges.
qat/calibration/explain_page.py draws it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from qat.base.choices import Calibrator
from qat.base.console import say, table
from qat.base.errors import UserError
from qat.base.number_format import NumberFormat
from qat.base.sqnr import sqnr_db
from qat.base.text import decibels, did_you_mean
from qat.calibration.activation_ranges import Batch, choose_ranges, observe
from qat.calibration.histogram import BINS, HistogramObserver
from qat.calibration.settings import CalibrationSettings
from qat.calibration.thresholds import best_threshold, entropy_of_thresholds, mse_of_thresholds
from qat.fake_quantize.prepare import ACTIVATION_QUANTIZERS, activation_quantizers, placement_of
from qat.fake_quantize.quantizer import SCALE_FLOOR, fake_quantize, scale_from_amax
from qat.graph.network import Network, Op
from qat.graph.tracing import network_of
from qat.rules.placement import Placement

Method = Literal[Calibrator, "in use"]
_ABSENT = "–"


@dataclass(frozen=True)
class Curve:
    """What each candidate for the threshold costs.

    Attributes:
        amax: the candidates, in the unit of x, rising; the last one is the exact max |x|.
        cost: the cost of each; infinite where the method cannot choose it.
        best: index of the candidate that the method chooses: the least cost, of equal ones the last.
    """

    amax: tuple[float, ...]
    cost: tuple[float, ...]
    best: int


@dataclass(frozen=True)
class Choice:
    """The range that one method chooses for a tensor.

    Attributes:
        method: its name; "in use" for a range of the network that none of them chooses, such as one of the checkpoint.
        amax: the threshold, in the unit of x.
        scale: what the tensor's codes are multiplied by.
        clipped: percentage of the values whose magnitude is above amax.
        sqnr_db: signal-to-quantization-noise ratio in dB, estimated from the histogram; None: no noise.
        kl: the divergence in nats from which entropy chooses; None where this amax is none of its candidates.
        in_use: whether the network has this range.
    """

    method: Method
    amax: float
    scale: float
    clipped: float
    sqnr_db: float | None
    kl: float | None
    in_use: bool


@dataclass(frozen=True)
class Explanation:
    """One quantized tensor, or several that share a scale, and how its range is chosen.

    Attributes:
        name: name of the quantizer.
        tensors: the tensors that it quantizes.
        number_format: the codes that they get.
        counts: counts[j] is the number of |x| in [j, j + 1) * limit / len(counts).
        limit: upper edge of the last bin, in the unit of x.
        largest: the exact max |x|; NaN if no image reached the tensor.
        kl: divergence of every candidate in nats; None if the tensor is zero or was not reached.
        mse: mean squared error of every candidate, in squared units of x; None as for ``kl``.
        choices: what max, percentile, mse and entropy choose, and the range in use where it is another; empty if the
            tensor was not reached.
    """

    name: str
    tensors: tuple[str, ...]
    number_format: NumberFormat
    counts: tuple[int, ...]
    limit: float
    largest: float
    kl: Curve | None
    mse: Curve | None
    choices: tuple[Choice, ...]

    @property
    def problem(self) -> str:
        """Why there is nothing to choose, as a sentence; '' where there is."""
        if math.isnan(self.largest):
            return "It was not computed for any calibration image, so it has no range."
        return "" if self.kl else "It is zero for every calibration image: dead channels, or too few images?"


def explain_calibration(
    prepared: fx.GraphModule,
    batches: Iterable[Batch],
    tensors: Iterable[str] = ("*",),
    percentile: float = 99.99,
) -> tuple[Explanation, ...]:
    """How the ranges of quantized tensors are chosen from images; ``draw_explanations`` makes a picture of it.

    Args:
        prepared: a model from ``prepare``, calibrated or not; it is not changed.
        batches: normalized images as ``calibrate_ranges`` takes them: [N, C, H, W], on any device.
        tensors: patterns (* ? []) of quantized tensors, by the names that python -m qat.placement shows.
        percentile: in (0, 100], for the method of that name.

    Returns one explanation for each quantizer, in the order of the network: amax in the unit of the tensor, divergences
    in nats, clipped shares in percent.
    Raises UserError when a pattern names no quantized tensor, when there is no batch, when a tensor holds NaN or
    infinity, or when ``percentile`` is out of range.
    """
    CalibrationSettings(percentile=percentile)  # checks it, before the images
    names = quantizers_named(network_of(prepared), placement_of(prepared), tensors)
    return explain(prepared, observe(prepared, batches), names, percentile)


def explain(
    prepared: fx.GraphModule, observers: Mapping[str, HistogramObserver], names: Iterable[str], percentile: float
) -> tuple[Explanation, ...]:
    """Explains the quantizers ``names``, from what ``qat.calibration.activation_ranges.observe`` returned."""
    quantizers, made_by = activation_quantizers(prepared), _tensors_of(placement_of(prepared))
    return tuple(
        _explain(
            name,
            made_by[name],
            quantizers[name].format,
            quantizers[name].amax.item(),
            observers[f"{ACTIVATION_QUANTIZERS}.{name}"],
            percentile,
        )
        for name in names
    )


def quantizers_named(network: Network, placement: Placement, patterns: Iterable[str]) -> list[str]:
    """The quantizers of the tensors that ``patterns`` name, in the order of the network.

    A pattern names a tensor by the name or the label of the operation that makes it, and all tensors of a module by the
    module's. The exact name of an operation means that one alone, even if it is the label of others. Raises UserError
    when a pattern names none that is quantized.
    """
    made_by, found = _tensors_of(placement), set()
    for pattern in patterns:
        named = {pattern} & network.ops.keys() or {op.name for op in network if _is_meant(pattern, op)}
        quantizers = {name for name, tensors in made_by.items() if named & set(tensors)}
        if not quantizers:
            raise UserError(
                f"--explain {pattern} names no quantized tensor{_advice(network, placement, pattern, named)}"
            )
        found |= quantizers
    return [name for name in made_by if name in found]


def say_explanations(explanations: Sequence[Explanation]) -> None:
    """Prints a table for each tensor."""
    for explanation in explanations:
        if explanation.choices:
            table(f"Range of {title_of(explanation)}", COLUMNS, map(cells, explanation.choices))
        if explanation.problem:
            say(f"{title_of(explanation)}: {explanation.problem}")


COLUMNS = ("method", "amax", "scale", "clipped", "SQNR", "KL in nats", "")


def cells(choice: Choice) -> tuple[str, ...]:
    """One row of the table whose heads are ``COLUMNS``."""
    return (
        choice.method,
        f"{choice.amax:.5g}",
        f"{choice.scale:.4g}",
        f"{choice.clipped:.4f} %",
        decibels(choice.sqnr_db),
        _ABSENT if choice.kl is None else f"{choice.kl:.4g}".replace("inf", "infinite"),
        "in use" if choice.in_use and choice.method != "in use" else "",
    )


def title_of(explanation: Explanation) -> str:
    """The name of the tensor, or those of all that share its scale."""
    others = [tensor for tensor in explanation.tensors if tensor != explanation.name]
    return f"{explanation.name}, shared by {', '.join(others)}" if others else explanation.name


def _explain(
    name: str,
    tensors: tuple[str, ...],
    number_format: NumberFormat,
    in_use: float,
    observer: HistogramObserver,
    percentile: float,
) -> Explanation:
    levels, counts = number_format.levels, observer.counts
    exact = observer.amax
    known = (name, tensors, number_format, tuple(counts.tolist()), observer.limit.item(), exact)
    if math.isnan(exact):
        return Explanation(*known, None, None, ())
    kl = mse = None
    ranges: dict[Method, float] = {}
    if exact / number_format.high >= SCALE_FLOOR:
        candidates, divergences = entropy_of_thresholds(counts, observer.limit, levels)
        candidates = torch.minimum(candidates, observer.largest)
        squared_bin = (observer.limit.double() / BINS) ** 2
        kl = _curve(candidates, divergences, levels)
        mse = _curve(candidates, mse_of_thresholds(counts, levels) * squared_bin, levels)
        ranges = {"mse": mse.amax[mse.best], "entropy": kl.amax[kl.best]}  # as choose_ranges does, which computes anew
    ranges = {
        method: ranges[method] if method in ranges else choose_ranges([observer], method, percentile, levels)[0]
        for method in get_args(Calibrator)
    }
    has = torch.tensor(list(ranges.values())).float() == in_use  # a network has its ranges in float32
    if not math.isnan(in_use) and not has.any():
        ranges["in use"] = in_use
    choices = [_choice(method, amax, number_format, observer, kl, in_use) for method, amax in ranges.items()]
    return Explanation(*known, kl, mse, tuple(choices))


def _curve(candidates: Tensor, cost: Tensor, levels: int) -> Curve:
    return Curve(tuple(candidates.tolist()), tuple(cost.tolist()), int(best_threshold(cost, levels)) - levels)


def _choice(
    method: Method,
    amax: float,
    number_format: NumberFormat,
    observer: HistogramObserver,
    kl: Curve | None,
    in_use: float,
) -> Choice:
    counts, limit = observer.counts.cpu().double(), observer.limit.item()
    width = max(limit / BINS, SCALE_FLOOR)
    edge = math.ceil(amax / width - 1e-6)  # of the bin that amax lies in, or that it ends
    scale = scale_from_amax(torch.tensor(amax), number_format)
    noise = signal = clipped = 0.0
    if kl is not None:
        clipped = 100 * float(counts[edge:].sum() / counts.sum())
        x = (torch.arange(BINS) + 0.5) * width
        error = (x - fake_quantize(x, scale, number_format)).double()
        noise, signal = (float((counts * values.double().square()).sum()) for values in (error, x))
    candidate = edge - number_format.levels
    is_candidate = kl is not None and 0 <= candidate < len(kl.cost)
    return Choice(
        method=method,
        amax=amax,
        scale=scale.item(),
        clipped=clipped,
        sqnr_db=sqnr_db(signal, noise),
        kl=kl.cost[candidate] if kl is not None and is_candidate else None,
        in_use=float(torch.tensor(amax)) == in_use,
    )


def _tensors_of(placement: Placement) -> dict[str, tuple[str, ...]]:
    """Quantizer -> the tensors that it quantizes."""
    found: dict[str, list[str]] = {}
    for tensor in placement.tensors:
        found.setdefault(tensor.quantizer, []).append(tensor.tensor)
    return {quantizer: tuple(tensors) for quantizer, tensors in found.items()}


def _is_meant(pattern: str, op: Op) -> bool:
    forms = (pattern, f"{pattern}.*", pattern.removesuffix(".*"))
    return any(fnmatchcase(name, form) for name in (op.name, op.label) for form in forms)


def _advice(network: Network, placement: Placement, pattern: str, named: set[str]) -> str:
    """What to give instead of ``pattern``, which names the operations ``named``."""
    read = list(dict.fromkeys(tensor for reader, tensor, _ in placement.reads() if reader in named))
    if read:
        return f": it reads {', '.join(read[:4])}{' and others' if len(read) > 4 else ''}; give that"
    known = [tensor.tensor for tensor in placement.tensors]
    if not known:
        return ": nothing is quantized in this network"
    labels = dict.fromkeys([*known, *(network[name].label for name in known)])
    what = ": what it makes is not quantized" if named else ""
    example = did_you_mean(pattern, labels) or f": give the name of one, for example {', '.join(known[:3])}"
    return f"{what}{example}"
