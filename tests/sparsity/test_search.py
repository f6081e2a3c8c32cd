"""The search for the largest cut within a limit finds the result of an exhaustive scan with few measurements."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gprune.sparsity.search import Point, find_largest_cut


def recording(curve):
    """A function from a cut (1 to the curve's length) to the curve's value, and the list of its arguments."""
    measured = []

    def measure(cut):
        measured.append(cut)
        return float(curve[cut - 1])

    return measure, measured


@settings(max_examples=100)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=400), st.floats(1e-3, 3.0), st.integers(1, 400))
def test_the_cut_of_an_increasing_curve_is_that_of_an_exhaustive_scan(steps, limit, first):
    curve = np.cumsum(steps)  # strictly increasing
    measure, measured = recording(curve)
    result = find_largest_cut(measure, limit, len(curve), first=first)
    within = np.flatnonzero(curve <= limit) + 1
    assert (result.best.cut if result.best else None) == (within[-1] if len(within) else None)
    assert len(measured) == len(set(measured)), "a cut was measured twice"


@pytest.mark.parametrize("limit", [math.log(r) for r in (1.01, 1.03, 1.1, 1.3, 11)])
@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.7, 3.0])
def test_curves_similar_to_those_of_models_need_few_measurements(limit, exponent):
    cuts = np.arange(1, 46_081) / 46_080
    curve = 4 * cuts**exponent + 8 * cuts ** (exponent + 3)
    measure, measured = recording(curve)
    result = find_largest_cut(measure, limit, len(curve), first=4608, unused=0.02)
    assert limit * 0.98 <= result.best.rise <= limit  # at most 2 % of the limit are unused
    assert len(measured) <= 6


@settings(max_examples=80)
@given(st.lists(st.floats(-0.5, 1.0), min_size=1, max_size=60), st.floats(0.01, 1.0), st.integers(1, 60))
def test_on_a_non_monotone_curve_the_cut_is_within_the_limit_and_the_next_is_not(steps, limit, first):
    curve = np.cumsum(steps)
    measure, measured = recording(curve)
    result = find_largest_cut(measure, limit, len(curve), first=first)
    assert len(measured) == len(set(measured))
    if result.best is None:
        assert curve[0] > limit
    else:
        assert curve[result.best.cut - 1] <= limit
        assert result.best.cut == len(curve) or curve[result.best.cut] > limit


@settings(max_examples=80)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=400), st.floats(1e-3, 3.0), st.integers(1, 400))
def test_a_coarse_search_ends_within_its_resolution_of_the_exhaustive_scan(steps, limit, first):
    curve, resolution = np.cumsum(steps), 20
    measure, measured = recording(curve)
    result = find_largest_cut(measure, limit, len(curve), first=first, resolution=resolution)
    largest = int((curve <= limit).sum())
    best_cut = result.best.cut if result.best else 0
    assert best_cut <= largest < best_cut + resolution
    assert len(measured) == len(set(measured))


def search_on_a_power_law(*, doubled: int | None = None) -> list[Point]:
    """Return the points of a search. The measurement of one of them may be doubled."""
    calls = itertools.count()

    def measure(cut: int) -> float:
        return (cut / 1000) ** 2 * (2 if next(calls) == doubled else 1)

    return find_largest_cut(measure, 0.25, 1000, first=100, expected=0.3, exponent=2.0, unused=0.02).points


def test_predictions_of_a_power_law_are_within_five_percent_and_the_first_is_the_expected_rise():
    first, *others = search_on_a_power_law()
    assert first.predicted == 0.3
    assert others
    assert all(point.rise == pytest.approx(point.predicted, rel=0.05) for point in others)


def test_a_prediction_does_not_know_its_own_measurement():
    points = search_on_a_power_law()
    for k, point in enumerate(points):
        assert search_on_a_power_law(doubled=k)[k].predicted == point.predicted


@pytest.mark.parametrize(("first", "limit", "cut"), [(50, 1e-9, None), (50, 99.0, 100), (1, 99.0, 100)])
def test_the_cut_can_be_none_or_the_whole_range(first, limit, cut):
    measure, measured = recording(np.linspace(0.01, 1, 100))
    result = find_largest_cut(measure, limit, 100, first=first, unused=0.1, tries=12)
    assert (result.best and result.best.cut) == cut
    assert len(measured) < 12
