"""Search for the largest cut that keeps a quality, with few measurements of a curve that rises with the cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

STEEPEST, FLATTEST = 4.0, 0.7  # limits of the exponent that is estimated from two measurements
GROWTH = 4.0  # largest factor between cuts until one is too large
LEAST = 0.05  # smallest relative change of the first step to one side; doubled in each next step
FLOOR = 0.02  # share of the limit that replaces smaller rises, because logarithms need positive numbers


class Point(NamedTuple):
    """A measured cut."""

    cut: int
    rise: float  # of log perplexity over the dense model
    predicted: float | None  # the rise that earlier points predicted


@dataclass(frozen=True)
class Found:
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
        return max((p for p in self.points if p.rise <= self.limit), key=lambda p: p.cut, default=None)

    @property
    def above(self) -> Point | None:
        """The smallest measured cut that is larger than `best` and above the limit, or None."""
        least = self.best.cut if self.best else 0
        return min((p for p in self.points if p.rise > self.limit and p.cut > least), key=lambda p: p.cut, default=None)

    def exponent(self, usual: float) -> float:
        """Estimate p of rise ~ cut^p from the two rises nearest to the limit. Return `usual` with fewer than two."""
        near = sorted(self.points, key=lambda p: abs(math.log(self._floored(p.rise) / self.limit)))[:2]
        if len(near) < 2 or near[0].cut == near[1].cut:
            return usual
        (x, y), (u, v) = ((math.log(p.cut), math.log(self._floored(p.rise))) for p in near)
        return min(STEEPEST, max(FLATTEST, (y - v) / (x - u)))

    def _floored(self, rise: float) -> float:
        return max(rise, FLOOR * self.limit)

    def proposal(self, aim: float, usual: float, most: int) -> tuple[int, float]:
        """Return the next cut to measure, at most `most`, and the predicted rise.

        The rise is assumed to be a power of the cut: through the two points next to the limit if there are points on
        both sides, else with the exponent of `exponent`.
        """
        best, above = self.best, self.above
        if best is not None and above is not None:
            low, high, rise = best.cut, above.cut, self._floored(best.rise)
            power = math.log(above.rise / rise) / math.log(high / low)
            cut = round(low * (aim / rise) ** (1 / power)) if not self._stuck else round(math.sqrt(low * high))
            cut = min(high - 1, max(low + 1, cut))
            return cut, rise * (cut / low) ** power
        at = best or above
        rise, power = self._floored(at.rise), self.exponent(usual)
        times, least = (aim / rise) ** (1 / power), 1 + LEAST * 2 ** min(len(self.points) - 1, 10)
        if best is not None:
            cut = min(most, max(at.cut + 1, round(at.cut * min(GROWTH, max(least, times)))))
        else:
            cut = max(1, min(at.cut - 1, round(at.cut * min(1 / least, times))))
        return cut, rise * (cut / at.cut) ** power

    @property
    def _stuck(self) -> bool:
        """Whether the last two measurements have not halved the gap, in logarithms, between `best` and `above`."""
        gaps = []
        for n in range(max(1, len(self.points) - 2), len(self.points) + 1):
            earlier = Found(self.points[:n], self.limit)
            if earlier.best is not None and earlier.above is not None:
                gaps.append(math.log(earlier.above.cut / earlier.best.cut))
        return len(gaps) == 3 and gaps[-1] > gaps[0] / 2


def largest_within(
    measure: Callable[[int], float], limit: float, most: int, *, first: int, expected: float | None = None,
    exponent: float = 1.5, unused: float = 0.0, tries: int | None = None,
) -> Found:  # fmt: skip
    """Search for the largest cut whose rise is at most `limit`.

    Args:
        measure: measures the rise of log perplexity of a cut.
        limit: the largest allowed rise, above 0.
        most: the largest cut; cuts are 1 to `most`.
        first: the cut to measure first.
        expected: the predicted rise of the first cut.
        exponent: p of rise ~ cut^p, until two cuts have been measured.
        unused: share of the limit that may stay unused; the search ends when the best cut is that near. With 0 it ends
            when the next larger cut exceeds the limit.
        tries: number of measurements after which the search ends, if a cut within the limit was found.

    Returns:
        All measurements. Its `best` is None if even a cut of 1 exceeds the limit.
    """
    found, cut = Found([], limit), min(most, max(1, first))
    while True:
        found.points.append(Point(cut, measure(cut), expected))
        best, above = found.best, found.above
        if best is None:
            if cut == 1:
                return found
        elif (
            best.cut == most
            or (unused and best.rise >= limit * (1 - unused))
            or (above is not None and above.cut - best.cut == 1)
            or (tries is not None and len(found.points) >= tries)
        ):
            return found
        cut, expected = found.proposal(limit * (1 - unused / 2), exponent, most)
