"""What calibration saw of every quantized activation, and the largest weights of every channel, for a report.

It comes from the histograms of the one pass over the images, by qat.calibration.explain.explain, so that a report shows
what calibration chose from. qat/base/ranges_file.py says what is kept of it, and writes the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor, fx

from qat.base.ranges_file import (
    COUNTS,
    MOST_CANDIDATES,
    ActivationDistribution,
    Distributions,
    Divergence,
    RangeChoice,
    WeightDistribution,
)
from qat.calibration.explain import Curve, Explanation, explain
from qat.calibration.histogram import BINS, HistogramObserver
from qat.calibration.settings import CalibrationSettings
from qat.fake_quantize.prepare import activation_quantizers, constant_weights

_DIGITS, _DIGITS_OF_WEIGHTS = 5, 4


def distributions(
    prepared: fx.GraphModule,
    observers: Mapping[str, HistogramObserver],
    calibration: CalibrationSettings,
    images: int,
) -> Distributions:
    """What is known of ``prepared`` right after calibration, for a checkpoint that is not written yet.

    Args:
        prepared: a calibrated model; quantized or not, its constant weights are described.
        observers: what qat.calibration.activation_ranges.observe returned.
        calibration: how the ranges were chosen.
        images: how many were observed.
    """
    quantizers = activation_quantizers(prepared)
    return Distributions(
        checkpoint="",
        calibrator=calibration.method,
        percentile=calibration.percentile,
        images=images,
        activations=tuple(
            _activation(explanation, quantizers[explanation.name].amax.item())
            for explanation in explain(prepared, observers, quantizers, calibration.percentile)
        ),
        weights=tuple(_weights(prepared)),
    )


def _activation(explanation: Explanation, in_use: float) -> ActivationDistribution:
    merged, counts = BINS // COUNTS, explanation.counts
    return ActivationDistribution(
        quantizer=explanation.name,
        tensors=explanation.tensors,
        counts=tuple(sum(counts[start : start + merged]) for start in range(0, BINS, merged)),
        limit=_rounded(explanation.limit),
        largest=_finite(explanation.largest),
        amax=_finite(in_use),
        choices=tuple(
            RangeChoice(
                choice.method,
                _rounded(choice.amax),
                _rounded(choice.clipped),
                None if choice.sqnr_db is None else _rounded(choice.sqnr_db),
            )
            for choice in explanation.choices
        ),
        kl=None if explanation.kl is None else _divergence(explanation.kl),
        problem=explanation.problem,
    )


def _divergence(curve: Curve) -> Divergence:
    """The first, the last and the chosen candidate, and others at equal distances."""
    last, steps = len(curve.amax) - 1, min(len(curve.amax), MOST_CANDIDATES - 1) - 1
    kept = {round(step * last / steps) for step in range(steps + 1)} if steps else {0}
    indices = sorted(kept | {curve.best})
    amax = tuple(_rounded(curve.amax[index]) for index in indices)
    return Divergence(amax, tuple(_finite(curve.cost[index]) for index in indices))


def _weights(prepared: fx.GraphModule) -> Iterator[WeightDistribution]:
    for op, weight, axis in constant_weights(prepared):
        assert op.weight is not None
        largest = _largest_of_outputs(weight, axis, op.weight.groups)
        dead = (largest == 0).nonzero().flatten().tolist()
        values = tuple(_finite(value, _DIGITS_OF_WEIGHTS) for value in largest.tolist())
        yield WeightDistribution(op.label, axis, values, tuple(dead))


def _largest_of_outputs(weight: Tensor, axis: int | None, groups: int) -> Tensor:
    """max |w| of each of the O output channels, [O].

    ``weight`` has them along ``axis``, or is a transposed convolution's, [I, O/groups, *kernel], if that is None.
    """
    weight = weight.detach().abs()
    if axis is None:
        of_groups = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return of_groups.amax((1, 3)).flatten()
    return weight.movedim(axis, 0).flatten(1).amax(1)


def _rounded(value: float, digits: int = _DIGITS) -> float:
    return float(f"{value:.{digits}g}")


def _finite(value: float, digits: int = _DIGITS) -> float | None:
    return _rounded(value, digits) if math.isfinite(value) else None
