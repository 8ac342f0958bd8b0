"""TensorRT's calibration cache as text: every form that it has, every scale to the last bit, and what is none."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.base.calibration_cache import CalibrationCache, looks_like_calibration_cache
from qat.base.errors import UserError

BODY = "input: 3caa1f6d\nconv1_output: 3d0a2c51\n"
LEGACY = "0 3ff0000000000000 3fefff2e48e8a71e"


def parsed(text: str | bytes) -> CalibrationCache:
    return CalibrationCache.parse(text.encode() if isinstance(text, str) else text, "the cache")


def refused(text: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        parsed(text)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("the cache")
    return str(caught.value)


def bits(scale: float) -> str:
    """As TensorRT writes it: without leading zeros."""
    return f"{struct.unpack('!I', struct.pack('!f', scale))[0]:x}"


@pytest.mark.parametrize(
    ("header", "calibrator"),
    [
        ("TRT-8600-EntropyCalibration2", "entropy2"),
        ("TRT-100300-EntropyCalibration2", "entropy2"),
        ("TRT-8600-MinMaxCalibration", "minmax"),
        ("TRT-8600-EntropyCalibration", "entropy"),
        ("TRT-8600-SomethingNew", None),
        (LEGACY, "legacy"),
        ("0 0 3fefff2e48e8a71e", "legacy"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_each_calibrator_has_its_header(header: str, calibrator: str | None, end: str, tmp_path: Path) -> None:
    text = f"{header}\n{BODY}".replace("\n", end)
    assert looks_like_calibration_cache(text)
    found = parsed(text)
    assert found.calibrator == calibrator
    assert found.scales == {
        "input": (1 + 0x2A1F6D / 2**23) / 2**6,
        "conv1_output": (1 + 0x0A2C51 / 2**23) / 2**5,
    }
    path = tmp_path / "cache"
    path.write_bytes(text.encode())
    assert CalibrationCache.read(path) == found


def test_a_scale_of_zero_has_one_digit() -> None:
    assert parsed("TRT-8600-EntropyCalibration2\ndead: 0\nsmall: 1\n").scales == {"dead": 0.0, "small": 2.0**-149}


NAMES = st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), min_size=1)
SCALES = st.floats(0, width=32, allow_infinity=False)


@given(st.dictionaries(NAMES, SCALES, min_size=1), st.sampled_from(["TRT-8600-MinMaxCalibration", LEGACY]))
@settings(max_examples=100, deadline=None)
def test_names_and_scales_come_back_to_the_last_bit(scales: dict[str, float], header: str) -> None:
    text = "".join(f"{line}\n" for line in [header, *(f"{name}: {bits(scale)}" for name, scale in scales.items())])
    found = parsed(text).scales
    assert list(found) == list(scales)
    assert [bits(scale) for scale in found.values()] == [bits(abs(scale)) for scale in scales.values()]


@given(st.binary(max_size=60), st.integers(0, 60), st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_the_bytes_it_is_a_cache_or_one_line(junk: bytes, position: int, whole: bool) -> None:
    good = f"TRT-8600-EntropyCalibration2\n{BODY}".encode()
    content = junk if whole else good[:position] + junk + good[position + len(junk) :]
    try:
        scales = parsed(content).scales
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert scales
        assert all(math.isfinite(scale) and scale >= 0 for scale in scales.values())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "its first line is ''"),
        ("\n", "its first line is ''"),
        (BODY, "its first line is 'input: 3caa1f6d'"),
        ("TRT-8600-EntropyCalibration2", "does not hold any tensor"),
        ("TRT-8600-EntropyCalibration2\n\n  \n", "does not hold any tensor"),
        ("TRT-EntropyCalibration2\na: 3caa1f6d\n", "should be TRT-<version>-<algorithm>"),
        ("0 3ff0000000000000\na: 3caa1f6d\n", "should be TRT-<version>-<algorithm>"),
        ("TRT-8600-EntropyCalibration2\na: 3caa1f6d0\n", "line 2"),
        ("TRT-8600-EntropyCalibration2\na: 3caa1f6d\nb: \n", "line 3"),
        ("TRT-8600-EntropyCalibration2\na 3caa1f6d\n", "line 2"),
        ("TRT-8600-EntropyCalibration2\na: 0x3caa1f\n", "line 2"),
        ("TRT-8600-EntropyCalibration2\na: 7f800000\n", "the scale of a is inf"),
        ("TRT-8600-EntropyCalibration2\na: 7fc00000\n", "the scale of a is nan"),
        ("TRT-8600-EntropyCalibration2\na: bc23d70a\n", "the scale of a is -0.01"),
        (b"TRT-8600-EntropyCalibration2\n\xff: 3caa1f6d\n", "which is text"),
    ],
)
def test_what_is_no_cache_is_one_line(text: str | bytes, says: str) -> None:
    assert says in refused(text)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the calibration cache"):
        CalibrationCache.read(tmp_path)


@pytest.mark.parametrize("text", ["tensor,min,max\n", '{"a": [0, 1]}', "", "TRT", "1 2 3 is no header"])
def test_other_texts_do_not_look_like_a_cache(text: str) -> None:
    assert looks_like_calibration_cache(text) is (text == "1 2 3 is no header")


def test_the_values_of_the_bits() -> None:
    assert np.float32(parsed(f"TRT-1-MinMaxCalibration\na: {bits(0.1)}\n").scales["a"]) == np.float32(0.1)
