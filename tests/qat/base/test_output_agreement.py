"""How well two networks agree on an output: SQNR of floating-point values, equality of all others."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qat.base.output_agreement import OutputAgreement, OutputSums


def measured(exact: object, other: object, dtype: type = np.float32) -> OutputAgreement:
    return OutputAgreement.measure("y", np.asarray(exact, dtype), np.asarray(other, dtype))


def test_floating_point_values_have_a_ratio() -> None:
    assert measured([3, 4], [3.5, 4]).sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))
    assert str(measured([3, 4], [3.5, 4])) == "y 20.0 dB"
    assert measured([3, 4], [3, 4]) == OutputAgreement("y", None, None)
    assert str(measured([3, 4], [3, 4])) == "y equal"
    assert measured([3, 4], [3.5, 4], np.float64).sqnr_db == pytest.approx(20)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.bool_])
def test_integers_are_equal_or_not(dtype: type) -> None:
    assert measured([1, 0, 1, 1], [1, 1, 1, 1], dtype) == OutputAgreement("y", None, 75.0)
    assert str(measured([1, 0, 1, 1], [1, 1, 1, 1], dtype)) == "y 75.00 % of the values equal"


def test_infinity_in_both_leaves_the_ratio_of_the_rest() -> None:
    assert measured([3, 4, -np.inf, np.nan], [3.5, 4, -np.inf, np.nan]).sqnr_db == pytest.approx(20, abs=0.01)
    for other in ([3.5, 4, 1, np.nan], [3.5, 4, np.inf, np.nan], [np.nan, 4, -np.inf, np.nan]):
        assert measured([3, 4, -np.inf, np.nan], other).equal_percent is not None


def test_zeros_have_no_ratio() -> None:
    assert measured([0, 0], [0, 1]) == OutputAgreement("y", None, 50.0)
    assert measured([0, 0], [0, 0]) == OutputAgreement("y", None, None)


def test_batches_are_added_and_may_differ_in_shape() -> None:
    sums = OutputSums("boxes")
    sums.add(np.array([1, 2, 3]), np.array([1, 2, 4]))
    sums.add(np.array([7]), np.array([7, 7]))
    assert sums.agreement() == OutputAgreement("boxes", None, 40.0)
    assert OutputSums("none").agreement() == OutputAgreement("none", None, None)
    ratio = OutputSums("y")
    for exact, other in ((3.0, 3.5), (4.0, 4.0)):
        ratio.add(np.array([exact]), np.array([other]))
    assert ratio.agreement().sqnr_db == pytest.approx(20)


def test_what_is_reached() -> None:
    assert measured([3, 4], [3.5, 4]).reaches(19.9, 100)
    assert not measured([3, 4], [3.5, 4]).reaches(20.1, 0)
    assert measured([3, 4], [3, 4]).reaches(1000, 1000)
    assert measured([1, 2], [1, 3], np.int64).reaches(1000, 50)
    assert not measured([1, 2], [1, 3], np.int64).reaches(0, 51)
