"""Random networks of the operations that placement knows: whatever they are, the pipeline agrees with itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.emit import emit
from export.fold import fold
from export.linter import lint_model
from export.parity import measure
from export.read import read_onnx
from qat.calibration.activation_ranges import calibrate_ranges
from qat.fake_quantize.prepare import placement_of, prepare

SIZE = 8  # pixels at the input; nothing but a pool or a stride makes them fewer
CHANNELS = (8, 16)
LEAST_DB = 60

# An operation on tensors that exist already: its name, which tensors it reads, and a number that chooses its variant.
Step = tuple[str, int, int, int]
KINDS = (
    *("convolution", "depthwise", "grouped", "dilated", "pointwise", "norm", "activation", "silu", "product"),
    *("add", "add_functional", "concat", "concat_itself", "max_pool", "average_pool", "split", "shuffle", "slice"),
    *("pad", "resize", "dropout", "gate", "permute", "functional_convolution", "linear", "layer_norm", "shared"),
    "dense",
)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.GELU)


@dataclass
class Made:
    """A tensor of the network that is being built: its channels and its height and width."""

    channels: int
    size: int


Compute = Callable[[Any, Tensor, Tensor], Tensor]  # of the step's layer, if it has one, and two tensors


class Random(nn.Module):
    """A network of the steps, each of which makes a tensor of two earlier ones; the last two give the answer.

    A step that does not fit its tensors passes the first one on.
    """

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.reads: list[tuple[int, int]] = []
        self.computes: list[Compute] = []
        made = [Made(8, SIZE)]
        for kind, first, second, variant in steps:
            self.reads.append((first % len(made), second % len(made)))
            a, b = (made[index] for index in self.reads[-1])
            becomes, compute = self._layer(kind, variant, a) or self._function(kind, variant, a, b) or (a, _first)
            made.append(becomes)
            self.computes.append(compute)
        self.heads = nn.ModuleList(nn.Linear(tensor.channels, 4) for tensor in made[-2:])

    def forward(self, x: Tensor) -> Tensor:
        tensors = [x]
        for index, (first, second) in enumerate(self.reads):
            layer = dict(self.layers.items()).get(str(index))
            tensors.append(self.computes[index](layer, tensors[first], tensors[second]))
        left, right = (F.adaptive_avg_pool2d(tensor, 1).flatten(1) for tensor in tensors[-2:])
        return self.heads[0](left) + self.heads[1](right)

    def _layer(self, kind: str, variant: int, a: Made) -> tuple[Made, Compute] | None:
        """Steps that need a module."""
        inputs, outputs = a.channels, CHANNELS[variant % 2]
        stride = 2 if kind == "convolution" and variant % 3 == 0 and a.size > 2 else 1
        layers: dict[str, tuple[Callable[[], nn.Module], int]] = {
            "convolution": (lambda: nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bool(variant % 2)), outputs),
            "dilated": (lambda: nn.Conv2d(inputs, outputs, 3, padding=2, dilation=2), outputs),
            "pointwise": (lambda: nn.Conv2d(inputs, outputs + 2 * (variant % 3), 1), outputs + 2 * (variant % 3)),
            "depthwise": (lambda: nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), inputs),
            "grouped": (lambda: nn.Conv2d(inputs, inputs, 3, padding=1, groups=2), inputs),
            "shared": (lambda: nn.Conv2d(inputs, inputs, 3, padding=1), inputs),
            "functional_convolution": (lambda: Kernel(inputs, outputs), outputs),
            "norm": (lambda: nn.BatchNorm2d(inputs), inputs),
            "layer_norm": (lambda: nn.LayerNorm(inputs), inputs),
            "linear": (lambda: nn.Linear(inputs, outputs), outputs),
            "activation": (lambda: ACTIVATIONS[variant % len(ACTIVATIONS)](), inputs),
            "dropout": (lambda: nn.Dropout(0.2), inputs),
            "gate": (
                lambda: nn.Sequential(nn.Conv2d(inputs, 8, 1), nn.ReLU(), nn.Conv2d(8, inputs, 1), nn.Sigmoid()),
                inputs,
            ),
        }
        if kind not in layers or (kind == "grouped" and inputs % 2):
            return None
        make, channels = layers[kind]
        self.layers[str(len(self.computes))] = make()
        compute: Compute = {
            "shared": lambda layer, x, _: layer(F.relu(layer(x))),
            "gate": lambda layer, x, _: x * layer(F.adaptive_avg_pool2d(x, 1)),
            "linear": lambda layer, x, _: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            "layer_norm": lambda layer, x, _: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        }.get(kind, lambda layer, x, _: layer(x))
        return Made(channels, (a.size + stride - 1) // stride), compute

    def _function(self, kind: str, variant: int, a: Made, b: Made) -> tuple[Made, Compute] | None:
        """Steps that are functions; None where the tensors do not fit."""
        channels, size, same = a.channels, a.size, a == b
        mode = "nearest" if variant % 2 else "bilinear"
        functions: dict[str, tuple[bool, Made, Compute]] = {
            "silu": (True, a, lambda _, x, __: x * torch.sigmoid(x)),
            "product": (same, a, lambda _, x, y: x * y),
            "add": (same, a, lambda _, x, y: x + y),
            "add_functional": (same, a, lambda _, x, y: torch.add(x, y).relu_()),
            "concat": (size == b.size, Made(channels + b.channels, size), lambda _, x, y: torch.cat([x, y], 1)),
            "concat_itself": (True, Made(2 * channels, size), lambda _, x, __: torch.cat([x, x], dim=1)),
            "dense": (size == b.size, Made(2 * (channels + b.channels), size), _dense),
            "max_pool": (size > 2, Made(channels, size // 2), lambda _, x, __: F.max_pool2d(x, 2)),
            "average_pool": (size > 2, Made(channels, size // 2), lambda _, x, __: F.avg_pool2d(x, 2)),
            "split": (channels % 2 == 0, Made(channels // 2, size), _half if variant % 2 else _sum_of_halves),
            "shuffle": (channels % 2 == 0, a, _shuffle),
            "slice": (size > 2, Made(channels, size - 1), lambda _, x, __: x[:, :, 1:, 1:]),
            "pad": (size <= SIZE, Made(channels, size + 2), lambda _, x, __: F.pad(x, (1, 1, 1, 1))),
            "resize": (
                size < SIZE,
                Made(channels, 2 * size),
                lambda _, x, __: F.interpolate(x, scale_factor=2.0, mode=mode),
            ),
            "permute": (True, a, lambda _, x, __: x.transpose(2, 3)),
        }
        fits, made, compute = functions.get(kind, (False, a, _first))
        return (made, compute) if fits and made.channels <= 64 else None


def _first(_: Any, x: Tensor, __: Tensor) -> Tensor:
    return x


def _dense(_: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y, F.relu(torch.cat([x, y], 1))], 1)


def _half(_: Any, x: Tensor, __: Tensor) -> Tensor:
    return x.chunk(2, dim=1)[1]


def _sum_of_halves(_: Any, x: Tensor, __: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=1)
    return left + right


def _shuffle(_: Any, x: Tensor, __: Tensor) -> Tensor:
    n, c, h, w = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Kernel(nn.Module):
    """A convolution by a function, its weight a bare parameter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs, 3, 3) / (3 * inputs**0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1)


numbers = st.integers(0, 30)
steps = st.lists(st.tuples(st.sampled_from(KINDS), numbers, numbers, numbers), min_size=2, max_size=12)


def check(chosen: list[Step]) -> None:
    """prepare, export, lint and ONNX Runtime agree on the network of these steps."""
    torch.manual_seed(0)
    model, x = Random(chosen).train(), torch.randn(4, 8, SIZE, SIZE)
    with torch.no_grad():
        model(x)
    model.eval()
    prepared = prepare(model, input_shape=x.shape[1:])
    with torch.no_grad():
        calibrate_ranges(prepared, [x], "max")
    folded, _ = fold(prepared)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(emit(folded, x, {}), path)
        onnx = read_onnx(path)
        assert [str(finding) for finding in lint_model(onnx)] == []
        quantized = sum(node.op_type == "QuantizeLinear" for node in onnx.graph)
        assert quantized == len(placement_of(prepared).tensors)
        parity, *_ = measure(folded, path, [(x, x)], 4)
    assert min(layer.sqnr_db for layer in parity.layers if layer.sqnr_db is not None) > LEAST_DB


GELU_OF_A_GROUPED_CONVOLUTION: list[Step] = [
    *(("layer_norm", 20, 0, 11), ("grouped", 19, 0, 24), ("gate", 14, 30, 0), ("dropout", 28, 0, 29)),
    *(("convolution", 11, 0, 0), *6 * (("convolution", 0, 0, 0),), ("activation", 2, 0, 7)),
]
DROPOUT_BEFORE_TWO_BRANCHES: list[Step] = [
    *(("dropout", 0, 26, 0), ("norm", 5, 0, 0), ("shared", 0, 0, 0), ("dense", 27, 18, 0)),
    *(("convolution", 0, 0, 0), ("convolution", 0, 0, 0), ("convolution", 18, 0, 0), ("convolution", 1, 0, 0)),
]


@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(steps)
@example([("norm", 0, 0, 0), ("norm", 1, 0, 0)])
@example(GELU_OF_A_GROUPED_CONVOLUTION)
@example(DROPOUT_BEFORE_TWO_BRANCHES)
def test_a_few_random_networks(chosen: list[Step]) -> None:
    check(chosen)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("EXAMPLES", 200)), deadline=None, suppress_health_check=list(HealthCheck))
@given(steps)
def test_random_networks(chosen: list[Step]) -> None:
    check(chosen)
