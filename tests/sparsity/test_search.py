"""The search for the largest cut within a limit: the same as of an exhaustive scan, by few measurements."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gprune.sparsity.search import find_largest_cut


def counted(curve):
    """The curve as a function of a cut, 1 to its length, and the cuts at which it was called."""
    asked = []

    def measure(cut):
        asked.append(cut)
        return float(curve[cut - 1])

    return measure, asked


@settings(max_examples=300)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=400), st.floats(1e-3, 3.0), st.integers(1, 400))
def test_the_cut_is_that_of_an_exhaustive_scan(steps, limit, first):
    curve = np.cumsum(steps)  # rises strictly
    measure, asked = counted(curve)
    found = find_largest_cut(measure, limit, len(curve), first=first)
    within = np.flatnonzero(curve <= limit) + 1
    assert (found.best.cut if found.best else None) == (within[-1] if len(within) else None)
    assert len(asked) == len(set(asked)), "a cut was measured twice"


@pytest.mark.parametrize("limit", [math.log(r) for r in (1.01, 1.03, 1.1, 1.3, 11)])
@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.7, 3.0])
def test_curves_like_those_of_models_take_few_measurements(limit, exponent):
    cuts = np.arange(1, 46_081) / 46_080
    curve = 4 * cuts**exponent + 8 * cuts ** (exponent + 3)
    measure, asked = counted(curve)
    found = find_largest_cut(measure, limit, len(curve), first=4608, unused=0.02)
    assert limit * 0.98 <= found.best.rise <= limit
    assert len(asked) <= 6


@settings(max_examples=200)
@given(st.lists(st.floats(-0.5, 1.0), min_size=1, max_size=60), st.floats(0.01, 1.0), st.integers(1, 60))
def test_on_a_curve_that_also_falls_the_cut_keeps_the_limit_and_the_next_does_not(steps, limit, first):
    curve = np.cumsum(steps)
    measure, asked = counted(curve)
    found = find_largest_cut(measure, limit, len(curve), first=first)
    assert len(asked) == len(set(asked))
    if found.best is None:
        assert curve[0] > limit
    else:
        assert curve[found.best.cut - 1] <= limit
        assert found.best.cut == len(curve) or curve[found.best.cut] > limit


def test_what_is_found_is_never_above_the_limit_however_few_measurements_are_allowed():
    measure, asked = counted(np.linspace(0.001, 2, 1000) ** 2)
    found = find_largest_cut(measure, 0.01, 1000, first=900, unused=0.01, tries=2)
    assert found.best.rise <= 0.01
    assert asked[-1] == found.best.cut, "measurements go on until one is within the limit, and no longer"


def test_predictions_are_of_the_points_before():
    measure, _ = counted((np.arange(1, 1001) / 1000) ** 2)
    first, *others = find_largest_cut(measure, 0.25, 1000, first=100, expected=0.3, exponent=2.0, unused=0.02).points
    assert first.predicted == 0.3
    assert all(point.rise == pytest.approx(point.predicted, rel=0.05) for point in others)


@pytest.mark.parametrize(("first", "limit", "cut"), [(50, 1e-9, None), (50, 99.0, 100), (1, 99.0, 100)])
def test_ends_of_the_range(first, limit, cut):
    measure, asked = counted(np.linspace(0.01, 1, 100))
    found = find_largest_cut(measure, limit, 100, first=first, unused=0.1, tries=12)
    assert (found.best and found.best.cut) == cut
    assert len(asked) < 12
