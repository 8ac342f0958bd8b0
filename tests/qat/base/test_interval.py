"""The interval of a share, against scipy's."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from qat.base.interval import interval_of_share, share_in_percent


@pytest.mark.parametrize(("count", "total"), [(0, 1), (1, 1), (595, 736), (9477, 10_000), (0, 300), (300, 300)])
def test_it_is_wilsons(count: int, total: int) -> None:
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert interval_of_share(count, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_in_words() -> None:
    assert share_in_percent(595, 736) == "80.84 % (77.8 to 83.5)"
