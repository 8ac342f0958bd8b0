"""The profile of kernels as a file, and what a kind of layer is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.base.errors import UserError
from qat.rules.kernel_profile import KernelProfile, LayerKind, MeasuredKind

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
        {"more": 1},
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
    with pytest.raises(UserError, match="cannot read the profile"):
        KernelProfile.read(tmp_path / "missing.json")
