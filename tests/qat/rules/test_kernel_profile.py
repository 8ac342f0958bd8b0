"""The profile of kernels as a file, and what a kind of layer is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.base.errors import UserError
from qat.graph.network import ConstantWeight
from qat.options import CalibrateOptions, TrainOptions
from qat.rules.kernel_profile import KernelProfile, LayerKind, MeasuredKind, given_profile

PLAIN = {"operation": "convolution", "in_channels": 8, "out_channels": 8, "kernel": [3, 3]}
GROUPED = LayerKind(operation="convolution", in_channels=240, out_channels=240, groups=5, kernel=(3, 3), stride=2)
MEASURED = MeasuredKind(kind=GROUPED, int8_ms=0.4, float_ms=0.1, in_int8=True, significant=True)
REFUSED = MeasuredKind(
    kind=LayerKind(operation="linear", in_channels=8, out_channels=64),
    int8_ms=None,
    float_ms=None,
    in_int8=None,
    significant=False,
    error="no kernel",
)
PROFILE = KernelProfile("A GPU", "9.0", "8.6.0", "2026-11-30T08:00:00+00:00", 32, (MEASURED, REFUSED))


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "h.json"
    PROFILE.write(path)
    assert KernelProfile.read(path) == PROFILE


def test_the_gain_is_how_many_times_as_fast_int8_is() -> None:
    assert MEASURED.gain == 0.25
    assert REFUSED.gain is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (GROUPED, "convolution, 240 -> 240, 48 a group, 3x3, stride 2"),
        (
            LayerKind(operation="convolution", in_channels=9, out_channels=9, groups=9, kernel=(3, 5), dilation=2),
            "convolution, 9 -> 9, depthwise, 3x5, dilation 2",
        ),
        (
            LayerKind(operation="transposed_convolution", in_channels=4, out_channels=8, weight_scales="tensor"),
            "transposed convolution, 4 -> 8, 1x1, scales by tensor",
        ),
        (LayerKind(operation="linear", in_channels=8, out_channels=64), "linear, 8 -> 64"),
        (
            LayerKind(operation="average_pool", in_channels=8, out_channels=8, kernel=(0, 0)),
            "average pool, 8 -> 8, global",
        ),
    ],
)
def test_what_a_kind_is_called(kind: LayerKind, name: str) -> None:
    assert str(kind) == name


@pytest.mark.parametrize(
    "change",
    [
        {"kinds": 3},
        {"kinds": [{}]},
        {"kinds": [{"kind": {"operation": "convolution"}}]},
        {"batch": 2.5},
        {"batch": "x"},
        *(
            {
                "kinds": [
                    {"kind": {**PLAIN, **part}, "int8_ms": 1.0, "float_ms": 1.0, "in_int8": True, "significant": True}
                ]
            }
            for part in ({"kernel": [1]}, {"kernel": [[1], [2]]}, {"weight_scales": "x"}, {"groups": 0}, {"groups": 3})
        ),
        {"kinds": [{"kind": PLAIN, "int8_ms": "a", "float_ms": 1.0, "in_int8": True, "significant": True}]},
        {"gpu": None, "kinds": [{"kind": {"operation": "x", "in_channels": 1, "out_channels": 1, "kernel": [1, 1]}}]},
    ],
)
def test_what_is_no_profile_is_refused_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "h.json"
    PROFILE.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"is no profile of kernels .*python -m deploy\.kernels") as caught:
        KernelProfile.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '"x"', "{}"])
def test_any_other_text_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text(text)
    with pytest.raises(UserError, match="is no profile of kernels"):
        KernelProfile.read(tmp_path / "h.json")
    with pytest.raises(UserError, match="cannot read the profile of kernels"):
        KernelProfile.read(tmp_path / "missing.json")


def measured(gain: float | None, *, significant: bool = True, in_int8: bool | None = None, **kind: Any) -> MeasuredKind:
    layer = LayerKind(operation=kind.pop("operation", "convolution"), **kind)
    times = (None, None) if gain is None else (1.0, gain)
    return MeasuredKind(kind=layer, int8_ms=times[0], float_ms=times[1], in_int8=in_int8, significant=significant)


def profile(*kinds: MeasuredKind) -> KernelProfile:
    return KernelProfile("A GPU", "9.0", "8.6.0", "2026-11-30T08:00:00+00:00", 32, kinds)


def grouped(width: int, gain: float) -> MeasuredKind:
    return measured(gain, in_channels=4 * width, out_channels=4 * width, groups=4, kernel=(3, 3))


def test_what_gains_and_what_loses() -> None:
    kind = {"in_channels": 16, "out_channels": 16}
    assert [measured(gain, **kind).gains for gain in (1.1, 0.9, None)] == [True, False, False]
    assert [measured(gain, **kind).loses for gain in (1.1, 0.9, None)] == [False, True, True]
    within_spread = measured(0.9, significant=False, **kind)
    assert not within_spread.gains
    assert not within_spread.loses


@pytest.mark.parametrize(
    ("kinds", "width", "fast"),
    [
        ((), 8, 8),
        ((), 24, 32),  # nothing was measured: 4, 8, 16 and multiples of 32
        ((), 20, 32),
        ((), 18, None),  # 32 is more than 1.6 times as many
        ((), 3, 4),
        ((), 2, None),
        ((), 160, 160),
        ((grouped(24, 2.0),), 24, 24),  # what was measured counts
        ((grouped(32, 0.5),), 24, None),
        ((grouped(40, 1.5), grouped(32, 0.5)), 32, 40),
    ],
)
def test_the_width_that_groups_are_padded_to(kinds: tuple[MeasuredKind, ...], width: int, fast: int | None) -> None:
    assert profile(*kinds).fast_group_width(width) == fast


def test_the_layer_that_is_most_alike() -> None:
    small = measured(2.0, in_channels=32, out_channels=32, kernel=(3, 3))
    large = measured(1.5, in_channels=256, out_channels=256, kernel=(3, 3))
    strided = measured(1.2, in_channels=64, out_channels=64, kernel=(3, 3), stride=2)
    dilated = measured(0.1, in_channels=64, out_channels=64, kernel=(3, 3), dilation=2)
    patches = measured(0.5, in_channels=3, out_channels=96, kernel=(4, 4), stride=4)
    depthwise = measured(2.2, in_channels=64, out_channels=64, groups=64, kernel=(3, 3))
    linear = measured(1.1, operation="linear", in_channels=64, out_channels=64)
    up = {"operation": "transposed_convolution", "in_channels": 64, "out_channels": 32, "kernel": (2, 2), "stride": 2}
    by_input, by_output = measured(1.1, weight_scales="input", **up), measured(None, **up)
    found = profile(small, large, strided, dilated, patches, depthwise, linear, by_output, by_input)

    def like(*weight: Any, operation: Any = "convolution") -> MeasuredKind | None:
        return found.like(operation, ConstantWeight("w", *weight))

    assert like(64, 32, 1, (3, 3), (1, 1)) == small
    assert like(128, 512, 1, (3, 3), (1, 1)) == large
    assert like(256, 256, 1, (3, 3), (2, 2)) == strided
    assert like(256, 256, 1, (5, 5), (1, 1)) is None
    assert like(8, 256, 1, (3, 3), (1, 1)) is None  # few channels have kernels of their own
    assert like(3, 768, 1, (16, 16), (16, 16)) == patches
    assert like(3, 768, 1, (2, 2), (2, 2)) is None
    assert like(48, 48, 48, (3, 3), (1, 1)) == depthwise
    assert like(48, 48, 48, (7, 7), (1, 1)) is None
    assert like(768, 768, operation="linear") == linear
    assert like(128, 64, 1, (2, 2), (2, 2), operation="transposed_convolution") == by_input


def test_the_profile_that_comes_with_the_rules() -> None:
    shipped = KernelProfile.shipped()
    assert str(shipped) == "NVIDIA H200, TensorRT 8.6.0"
    found = shipped.of_group_width(48)
    assert found is not None
    assert found.loses
    assert shipped.fast_group_width(48) == 64


def test_a_given_profile_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h.json"
    profile(grouped(48, 0.5)).write(path)
    assert given_profile(path) == KernelProfile.read(path)
    said = " ".join(capsys.readouterr().out.split())
    assert "1 kinds of layers, measured on A GPU, TensorRT 8.6.0" in said
    assert "are missing, such as convolution" in said
    assert "there the rules are cautious" in said
    KernelProfile.shipped().write(path)
    given_profile(path)
    assert "missing" not in capsys.readouterr().out
    assert given_profile(None) is None


@pytest.mark.parametrize("options", [TrainOptions, CalibrateOptions])
def test_commands_read_a_profile(options: Any, tmp_path: Path) -> None:
    PROFILE.write(tmp_path / "h.json")
    assert options(profile=tmp_path / "h.json").kernel_profile() == PROFILE
    assert options().kernel_profile() is None


@pytest.mark.parametrize(
    ("entry", "value"),
    [("error", ["x"]), ("significant", "no"), ("significant", []), ("in_int8", [1]), ("int8_ms", True)],
)
def test_entries_of_other_types_are_refused(entry: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "h.json"
    PROFILE.write(path)
    content = json.loads(path.read_text())
    content["kinds"][0][entry] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is no profile of kernels"):
        KernelProfile.read(path)


def test_a_layer_that_the_builder_ran_in_float_does_not_gain() -> None:
    assert not measured(2.0, in_channels=16, out_channels=16, in_int8=False).gains
