"""Chooses the amax of every activation tensor, by one of four methods, from one pass over the images.

The pass runs the float network and keeps a histogram of every tensor (qat/calibration/histogram.py). Each method
chooses amax from the histogram (qat/calibration/thresholds.py); it never exceeds the exact max |x|. Ranges of weights
need no images, see qat/fake_quantize/weight_ranges.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor, nn

from qat.base.choices import Calibrator
from qat.base.errors import UserError
from qat.base.number_format import INT8
from qat.calibration.histogram import HistogramObserver, check_finite, largest_of
from qat.calibration.thresholds import amax_entropy, amax_mse, amax_percentile
from qat.compute.processes import SINGLE_PROCESS, Processes
from qat.fake_quantize.quantizer import (
    SCALE_FLOOR,
    ActivationQuantizer,
    WeightQuantizer,
)
from qat.graph.inputs import Inputs

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a model is called with: its only input, its inputs in their order, or by the names of its arguments."""


def observe(
    model: nn.Module,
    batches: Iterable[Batch],
    on_batch: Callable[[], None] | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, HistogramObserver]:
    """Runs the float network in eval mode and observes the input of every ActivationQuantizer.

    Args:
        model: contains ActivationQuantizers; if one is called several times, all its inputs are observed.
        batches: inputs of ``model``, on any device: a tensor, a tuple of them, or a dict by the names of its arguments.
        on_batch: called after every batch, to show progress.
        processes: the processes that share the images. Each gets the merged observers of all, even if it had no batch.

    Returns the observers by the names of the quantizers; ``set_ranges`` can choose from them with any method.
    Modes and enabled weight quantizers are restored at the end, also after an exception.
    Raises UserError when there is no batch, a tensor holds NaN or infinity, or every channel is constant.
    """
    quantizers = _quantizers(model)
    observers = {name: HistogramObserver(name, q.amax.device) for name, q in quantizers.items()}
    extremes: list[Tensor] = []
    given_batches = (in_order(batch, model) for batch in batches)
    with _observe_float_network(model, observers), torch.no_grad():
        for batch in _agree_on_limits(model, observers, given_batches, processes):
            channels = [one.transpose(0, 1).flatten(1) if one.ndim > 1 else one[None] for one in batch]
            extremes.append(torch.cat([torch.stack(torch.aminmax(one, dim=1)) for one in channels], 1))
            model(*batch)
            if on_batch is not None:
                on_batch()
    check_finite(observers.values())
    constant = all(torch.equal(low, high) and torch.equal(low, extremes[0][0]) for low, high in extremes)
    given, varied = processes.any(bool(extremes), not constant)
    if not given:
        raise UserError("calibration got no images: give a calibration split of at least one batch")
    if not varied:
        raise UserError("all calibration images are the same constant: they give no useful ranges; give real images")
    merge(list(observers.values()), processes)
    return observers


def in_order(batch: Batch, model: nn.Module) -> tuple[Tensor, ...]:
    """The inputs in the order of the model's arguments, on its device."""
    device = next(model.parameters()).device
    inputs: Any = getattr(model, "meta", {}).get("inputs", Inputs({}))
    if isinstance(batch, Tensor):
        return (batch.to(device),)
    if isinstance(batch, Mapping):
        names = list(inputs.shapes)
        if set(batch) != set(names):
            raise UserError(f"a batch holds {', '.join(batch)}, and the model was prepared for {', '.join(names)}")
        batch = [batch[name] for name in names]
    return tuple(one.to(device) for one in batch)


def _agree_on_limits(
    model: nn.Module,
    observers: Mapping[str, HistogramObserver],
    batches: Iterable[tuple[Tensor, ...]],
    processes: Processes,
) -> Iterator[tuple[Tensor, ...]]:
    """``batches``; if several processes share them, all first agree on the limits from which their histograms start.

    Limits only double, so histograms that start from the same limit can be merged bin by bin. Every process sends the
    same two messages, one here and one in ``merge``, however many batches it has.
    """
    if processes.world_size > 1 and observers:
        rest = iter(batches)
        first = next(rest, None)
        if first is not None:
            model(*first)
        found = list(observers.values())
        # Infinity instead of NaN, whose maximum is not defined: so all processes raise the same error.
        ours = torch.stack([observer.largest for observer in found]).nan_to_num(nan=math.inf, posinf=math.inf)
        agreed = processes.largest(ours).tolist()
        for observer, value in zip(found, agreed, strict=True):
            observer.largest.fill_(value)
        check_finite(found)
        for observer, value in zip(found, agreed, strict=True):
            observer.start(value)
        batches = rest if first is None else chain([first], rest)
    yield from batches


def merge(observers: Sequence[HistogramObserver], processes: Processes) -> None:
    """Merges the observers of all processes; afterwards every process has the same."""
    if processes.world_size == 1 or not observers:
        return
    ours = torch.stack([torch.stack([o.limit, o.largest, o.limit.new_tensor(float(o.seen))]) for o in observers])
    for observer, (limit, largest, seen) in zip(observers, processes.largest(ours).tolist(), strict=True):
        observer.grow(limit)
        observer.largest.fill_(largest)
        observer.seen = bool(seen)
    for observer, counts in zip(observers, processes.add(torch.stack([o.counts for o in observers])), strict=True):
        observer.counts.copy_(counts)


def set_ranges(
    model: nn.Module, observers: Mapping[str, HistogramObserver], method: Calibrator, percentile: float = 99.99
) -> list[str]:
    """Writes the amax of every ActivationQuantizer, chosen by ``method`` from what ``observers`` saw.

    Returns one line of warning for each tensor that was always zero (its amax becomes 0, its scale the floor), or that
    no batch reached (its amax does not change).
    """
    warnings, quantizers = [], _quantizers(model)
    ranges: dict[str, float] = {}
    for levels in {quantizer.format.levels for quantizer in quantizers.values()}:
        alike = [name for name, quantizer in quantizers.items() if quantizer.format.levels == levels]
        chosen = choose_ranges([observers[name] for name in alike], method, percentile, levels)
        ranges |= zip(alike, chosen, strict=True)
    exact = largest_of([observers[name] for name in quantizers])
    for (name, quantizer), largest in zip(quantizers.items(), exact, strict=True):
        if math.isnan(ranges[name]):
            warnings.append(f"tensor {name} was not computed for any calibration batch: it has no range")
            continue
        quantizer.amax.fill_(ranges[name])
        if largest / quantizer.format.high < SCALE_FLOOR:
            warnings.append(f"tensor {name} is zero for every calibration image: dead channels, or too few images?")
    return warnings


def calibrate_ranges(
    model: nn.Module,
    batches: Iterable[Batch],
    method: Calibrator = "mse",
    percentile: float = 99.99,
    on_batch: Callable[[], None] | None = None,
) -> list[str]:
    """Sets the amax of every ActivationQuantizer of ``model`` from one pass over ``batches``.

    See ``observe`` for the other arguments and the errors, and ``set_ranges`` for the warnings that are returned.
    ``percentile``, in (0, 100], is used by the method of that name.
    """
    return set_ranges(model, observe(model, batches, on_batch), method, percentile)


def choose_ranges(
    observers: Sequence[HistogramObserver], method: Calibrator, percentile: float = 99.99, levels: int = INT8.levels
) -> list[float]:
    """The amax that ``method`` chooses for each tensor: at most the exact max, NaN for a tensor that was not seen.

    ``levels``: number of codes that a magnitude can have.
    """
    if method not in get_args(Calibrator):
        raise ValueError(f"no calibration method {method!r}: choose max, percentile, mse or entropy")
    if method == "max" or not observers:
        chosen = largest_of(observers)
    else:
        counts, limits, exact = (
            torch.stack([getattr(observer, name) for observer in observers]) for name in ("counts", "limit", "largest")
        )
        if method == "percentile":
            found = amax_percentile(counts, limits, percentile)
        else:
            found = (amax_mse if method == "mse" else amax_entropy)(counts, limits, levels)
        chosen = torch.minimum(exact, found).tolist()
    return [amax if observer.seen else math.nan for observer, amax in zip(observers, chosen, strict=True)]


def _quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)}


@contextmanager
def _observe_float_network(model: nn.Module, observers: Mapping[str, HistogramObserver]) -> Iterator[None]:
    """Sets eval mode, float weights and the observers; restores everything at the end."""
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
