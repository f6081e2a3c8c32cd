"""Search for the largest cut that keeps a quality, with few measurements of a curve that rises with the cut.

A *cut* is a whole number: the number of steps of cost that are removed. The *rise* of a cut is the rise of log
perplexity over the dense model. The search assumes that the rise grows as a power of the cut, rise ~ cut^p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

STEEPEST, FLATTEST = 4.0, 0.7  # limits of the exponent that is estimated from two measurements
GROWTH = 4.0  # largest factor between consecutive cuts as long as all cuts are within the limit
LEAST = 0.05  # smallest relative change of the first step to one side; doubled in each next step
MAX_DOUBLINGS = 10  # number of doublings after which the smallest relative change stays constant
FLOOR = 0.02  # share of the limit that replaces smaller rises, because logarithms need positive numbers


class Point(NamedTuple):
    """A measured cut."""

    cut: int
    rise: float  # of log perplexity over the dense model
    predicted: float | None  # the rise that earlier points predicted


@dataclass(frozen=True)
class SearchResult:
    """The measurements of a search, in order.

    Attributes:
        points: all measured cuts.
        limit: the largest allowed rise.
    """

    points: list[Point]
    limit: float

    @property
    def best(self) -> Point | None:
        """The largest measured cut within the limit, or None."""
        within = [point for point in self.points if point.rise <= self.limit]
        return max(within, key=lambda point: point.cut, default=None)

    @property
    def above(self) -> Point | None:
        """The smallest measured cut that is larger than `best` and above the limit, or None."""
        best_cut = self.best.cut if self.best else 0
        too_large = [point for point in self.points if point.rise > self.limit and point.cut > best_cut]
        return min(too_large, key=lambda point: point.cut, default=None)

    def exponent(self, default: float) -> float:
        """Estimate p of rise ~ cut^p from the two points whose rises are nearest to the limit."""
        nearest = sorted(self.points, key=lambda point: abs(math.log(self._floored(point.rise) / self.limit)))[:2]
        if len(nearest) < 2 or nearest[0].cut == nearest[1].cut:
            return default
        log_cuts = [math.log(point.cut) for point in nearest]
        log_rises = [math.log(self._floored(point.rise)) for point in nearest]
        slope = (log_rises[0] - log_rises[1]) / (log_cuts[0] - log_cuts[1])
        return min(STEEPEST, max(FLATTEST, slope))

    def _floored(self, rise: float) -> float:
        return max(rise, FLOOR * self.limit)

    def proposal(self, target_rise: float, default_exponent: float, max_cut: int) -> tuple[int, float]:
        """Return the next cut to measure, at most `max_cut`, and the predicted rise of this cut.

        If cuts on both sides of the limit are known, the cut is interpolated between the two next to the limit.
        Otherwise it is extrapolated from the point next to the limit.
        """
        if self.best is not None and self.above is not None:
            return self._interpolated(self.best, self.above, target_rise)
        return self._extrapolated(target_rise, self.exponent(default_exponent), max_cut)

    def _interpolated(self, best: Point, above: Point, target_rise: float) -> tuple[int, float]:
        """Return a cut between `best` and `above`, and its predicted rise, from the power law through both points."""
        rise = self._floored(best.rise)
        power = math.log(above.rise / rise) / math.log(above.cut / best.cut)
        if self._converges_slowly:
            cut = round(math.sqrt(best.cut * above.cut))  # bisect in logarithms
        else:
            cut = round(best.cut * (target_rise / rise) ** (1 / power))
        cut = min(above.cut - 1, max(best.cut + 1, cut))
        return cut, rise * (cut / best.cut) ** power

    def _extrapolated(self, target_rise: float, power: float, max_cut: int) -> tuple[int, float]:
        """Return a cut beyond all measured cuts, and its predicted rise, from the point next to the limit.

        The smallest relative change of the cut doubles with each measurement, so that the limit is soon passed.
        """
        best = self.best
        nearest = best or self.above
        rise = self._floored(nearest.rise)
        factor = (target_rise / rise) ** (1 / power)
        smallest_factor = 1 + LEAST * 2 ** min(len(self.points) - 1, MAX_DOUBLINGS)
        if best is not None:
            cut = round(nearest.cut * min(GROWTH, max(smallest_factor, factor)))
            cut = min(max_cut, max(nearest.cut + 1, cut))
        else:
            cut = round(nearest.cut * min(1 / smallest_factor, factor))
            cut = max(1, min(nearest.cut - 1, cut))
        return cut, rise * (cut / nearest.cut) ** power

    @property
    def _converges_slowly(self) -> bool:
        """Whether the last two measurements reduced log(above.cut / best.cut) by less than half.

        False unless there were cuts on both sides of the limit before these two measurements.
        """
        gaps = []
        for count in range(max(1, len(self.points) - 2), len(self.points) + 1):
            earlier = SearchResult(self.points[:count], self.limit)
            if earlier.best is not None and earlier.above is not None:
                gaps.append(math.log(earlier.above.cut / earlier.best.cut))
        return len(gaps) == 3 and gaps[-1] > gaps[0] / 2  # three gaps are those around two measurements


def find_largest_cut(
    measure: Callable[[int], float], limit: float, max_cut: int, *, first: int, expected: float | None = None,
    exponent: float = 1.5, unused: float = 0.0, resolution: int = 1, tries: int | None = None,
) -> SearchResult:  # fmt: skip
    """Search for the largest cut, at most `max_cut`, whose rise is at most `limit`.

    The search ends without a cut within the limit if a cut of at most `resolution` is above the limit.

    Args:
        measure: function that returns the rise of a cut.
        first: the cut that is measured first.
        expected: the predicted rise of this cut.
        exponent: p of rise ~ cut^p, until two points are known.
        unused: a cut ends the search if its rise leaves at most this share of the limit unused; never with 0.
        resolution: the search ends if cuts within and above the limit differ by at most this number.
        tries: number of measurements after which the search ends if a cut is within the limit.
    """
    result = SearchResult([], limit)
    cut = min(max_cut, max(1, first))
    while True:
        result.points.append(Point(cut, measure(cut), expected))
        best, above = result.best, result.above
        if best is None:
            if cut <= resolution:
                return result
        else:
            is_largest = best.cut == max_cut or (above is not None and above.cut - best.cut <= resolution)
            is_close_enough = unused > 0 and best.rise >= limit * (1 - unused)
            tries_are_spent = tries is not None and len(result.points) >= tries
            if is_largest or is_close_enough or tries_are_spent:
                return result
        cut, expected = result.proposal(limit * (1 - unused / 2), exponent, max_cut)
