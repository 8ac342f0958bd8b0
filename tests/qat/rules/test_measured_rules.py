"""Decisions that rest on what was measured on a GPU, and what their reasons say."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from first_layer import input_of
from torch import Tensor, nn

from qat.fake_quantize.prepare import placement_of, prepare
from qat.graph.tracing import network_of, trace
from qat.rules.kernel_profile import KernelProfile, LayerKind, MeasuredKind
from qat.rules.place import place
from qat.rules.placement import Decision, Placement

H200 = "NVIDIA H200, TensorRT 8.6.0"


def placement(model: nn.Module, profile: KernelProfile | None = None) -> Placement:
    channels, *_ = input_of(model)
    return place(network_of(trace(model.eval(), (channels, 32, 32))), profile=profile)


def first(model: nn.Module, profile: KernelProfile | None = None) -> Decision:
    return placement(model, profile).weights[0]


def measured(int8_ms: float, float_ms: float, **kind: object) -> KernelProfile:
    layer = LayerKind(operation="convolution", kernel=(3, 3), **kind)  # type: ignore[arg-type]
    found = MeasuredKind(kind=layer, int8_ms=int8_ms, float_ms=float_ms, in_int8=True, significant=True)
    return KernelProfile("Another GPU", "12.0", "10.16", "2026-11-30", 32, (found,))


def grouped(width: int, groups: int = 2) -> nn.Module:
    """Zero channels fit on both sides of the grouped convolution."""
    channels = width * groups
    layers = (nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, channels, 3, groups=groups), nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(channels, 16, 1))


@pytest.mark.parametrize(
    ("layer", "quantized"),
    [
        (nn.Conv2d(3, 64, 7, 2, 3), True),
        (nn.Conv2d(3, 32, 3, 2, 1), True),
        (nn.Conv2d(3, 96, 4, 4), False),  # patches
        (nn.Conv2d(3, 768, 14, 14), False),
        (nn.Conv2d(64, 96, 4, 4), True),  # not of an image
        (nn.Conv2d(3, 64, 11, 4), False),
    ],
)
def test_a_layer_like_one_that_lost_stays_in_float(layer: nn.Module, quantized: bool) -> None:
    found = first(nn.Sequential(layer, nn.ReLU(), nn.Conv2d(layer.out_channels, 16, 1)))
    assert found.quantized is quantized
    if not quantized:
        assert found.rule == "measured_loss"
        assert "times as fast in INT8" in found.reason
        assert f"({H200})" in found.reason


@pytest.mark.parametrize(
    ("width", "padded"), [(48, 64), (24, 32), (12, 16), (20, 32), (112, 128), (16, None), (96, None)]
)
def test_groups_without_a_kernel_are_padded(width: int, padded: int | None) -> None:
    found = placement(grouped(width)).weights[1]
    assert found.quantized
    assert found.group_widths == (None if padded is None else (padded, padded))
    assert found.rule == ("weighted_input" if padded is None else "grouped_channels")
    if padded is not None:
        assert f"{width} channels in a group" in found.reason
        assert f"times as fast in INT8 ({H200}), padded to {padded}" in found.reason


def test_groups_that_cannot_be_padded_stay_in_float() -> None:
    (found,) = placement(nn.Sequential(nn.Conv2d(96, 96, 3, groups=2))).weights
    assert not found.quantized
    assert "zero channels do not fit between it and its neighbours" in found.reason
    wide = placement(grouped(18, 4)).weights[1]
    assert not wide.quantized
    assert "no width of up to 1.6 times as many channels" in wide.reason


def test_a_given_profile_decides() -> None:
    good = measured(1.0, 2.0, in_channels=96, out_channels=96, groups=2)
    assert placement(grouped(48), good).weights[1].group_widths is None
    dense = {"in_channels": 64, "out_channels": 64}
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    assert first(model).quantized
    lost = first(model, measured(2.0, 1.0, **dense))
    assert (lost.quantized, lost.rule) == (False, "measured_loss")
    assert "0.50 times as fast in INT8 (Another GPU, TensorRT 10.16)" in lost.reason
    prepared = prepare(model, input_shape=(64, 8, 8), profile=measured(2.0, 1.0, **dense))
    assert not any(decision.quantized for decision in placement_of(prepared).weights)


def test_the_widths_survive_json() -> None:
    found = placement(grouped(48))
    assert Placement.from_json(found.to_json()) == found


def test_what_is_next_to_groups_without_a_kernel_stays_in_float_too() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.before, self.behind = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 72, 1), nn.Conv2d(72, 32, 1)
            self.grouped, self.head = nn.Conv2d(72, 72, 3, groups=4), nn.Conv2d(32, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.before(F.relu(self.stem(x))))
            return self.head(F.relu(self.behind(F.silu(self.grouped(x)))))

    decided = {one.label: (one.quantized, one.rule) for one in placement(Around()).weights}
    assert decided == {
        "stem": (True, "weighted_input"),
        "before": (False, "beside_float_groups"),
        "grouped": (False, "grouped_channels"),
        "behind": (False, "beside_float_groups"),
        "head": (True, "weighted_input"),
    }


class Skip(nn.Module):
    """relu(second(x) + x), and a convolution that reads it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.second = nn.Conv2d(16, 16, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.second(x) + x))


@pytest.mark.parametrize(("groups", "rule"), [(1, "residual_add"), (4, "residual_add"), (16, "unfused_add")])
def test_no_sum_fuses_into_a_depthwise_convolution(groups: int, rule: str) -> None:
    found = placement(Skip(groups))
    (added,) = found.decisions_about("add")
    assert (added.quantized, added.rule) == (True, rule)
    quantized = {tensor.tensor for tensor in found.tensors for read in tensor.reads if read.reader == added.op}
    assert quantized == ({"relu", "second"} if groups == 16 else {"relu"})
