"""The largest pruned share within a perplexity ratio, interpolated from a curve."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gprune.method.summary import largest_share


@given(st.lists(st.floats(-0.2, 1.0), min_size=1, max_size=6), st.floats(1.01, 3.0))
def test_largest_share_equals_a_fine_scan_of_the_monotone_interpolation(rises, ratio):
    shares = np.arange(len(rises) + 1) / 10
    logs = np.concatenate([[0], np.cumsum(rises)])
    largest = largest_share(dict(zip(shares, 20 * np.exp(logs), strict=True)), ratio)
    fine_shares = np.linspace(0, shares[-1], 20_001)
    interpolated = np.interp(fine_shares, shares, np.maximum.accumulate(logs))
    within = fine_shares[interpolated <= np.log(ratio)]
    assert largest.value == pytest.approx(within[-1], abs=1e-4)
    assert largest.at_least == bool(np.maximum.accumulate(logs)[-1] <= np.log(ratio))


def test_largest_share_of_a_convex_curve_is_not_overestimated():
    def curve(share):
        return 15 * np.exp(3 * share**1.8)

    largest = largest_share({share: curve(share) for share in (0.0, 0.2, 0.35, 0.5)}, 1.1)
    assert curve(largest.value) < 1.1 * 15


@pytest.mark.parametrize("curve", [{}, {0.0: 12.0}, {0.2: 12.0, 0.5: 30.0}])
def test_largest_share_needs_the_dense_model_and_another_point(curve):
    assert largest_share(curve, 1.1) is None


def test_largest_share_prints_as_a_percentage():
    curve = {0.0: 10.0, 0.2: 12.0, 0.5: 40.0}
    assert [str(largest_share(curve, ratio)) for ratio in (1.0002, 1.1, 9.0)] == ["0.0 %", "10 %", "at least 50 %"]
