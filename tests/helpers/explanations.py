"""Tensors of several kinds, and how the range of each is chosen."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from own_network import Net
from torch import Tensor, fx

from qat.base.number_format import INT8, NumberFormat
from qat.calibration.explain import Explanation, explain
from qat.calibration.histogram import HistogramObserver
from qat.fake_quantize.prepare import activation_quantizers, prepare


@lru_cache(maxsize=1)
def _network() -> fx.GraphModule:
    return prepare(Net(), input_shape=(3, 16, 16))


def explained(values: Tensor | None, number_format: NumberFormat = INT8, in_use: float = math.nan) -> Explanation:
    """The explanation of a tensor with these values."""
    quantizer = activation_quantizers(_network())["x"]
    quantizer.format = number_format
    quantizer.amax.fill_(in_use)
    (found,) = explain(_network(), {"activation_quantizers.x": observer_of(values)}, ["x"], 99.99)
    return found


def observer_of(values: Tensor | None) -> HistogramObserver:
    observer = HistogramObserver("x")
    if values is not None:
        observer(values)
    return observer


def samples(kind: str) -> Tensor:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    return {
        "signed": x,
        "relu": x.relu(),
        "heavy tail": x * x.abs() ** 2,
        "outlier": torch.cat([x, torch.tensor([40.0])]),
        "one magnitude": torch.full((9,), -3.0),
        "tiny": x * 1e-20,
    }[kind]


KINDS = ("signed", "relu", "heavy tail", "outlier", "one magnitude", "tiny")
