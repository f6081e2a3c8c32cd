"""The largest cut that keeps a quality, found by few measurements of a curve that rises with the cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

STEEPEST, FLATTEST = 4.0, 0.7  # exponents of the curve that are believed when they come from two measurements
GROWTH = 4.0  # by how many times a cut grows at most before one is too large
LEAST = 0.05  # by what share it changes at least in the first step to one side; twice that in the next, and so on
FLOOR = 0.02  # of the limit, which a smaller rise, or a fall, counts as: logarithms need a number above 0


class Point(NamedTuple):
    """A cut that was measured."""

    cut: int
    rise: float  # of the log perplexity over that of the dense model
    predicted: float | None  # the rise that earlier points gave reason to expect


@dataclass(frozen=True)
class Found:
    """What a search has measured, in order.

    Attributes:
        points: all cuts that were measured.
        limit: the largest rise that was allowed.
    """

    points: list[Point]
    limit: float

    @property
    def best(self) -> Point | None:
        """The largest cut that was measured within the limit; None if there is none."""
        return max((p for p in self.points if p.rise <= self.limit), key=lambda p: p.cut, default=None)

    @property
    def above(self) -> Point | None:
        """The smallest cut beyond `best` that was measured above the limit."""
        least = self.best.cut if self.best else 0
        return min((p for p in self.points if p.rise > self.limit and p.cut > least), key=lambda p: p.cut, default=None)

    def exponent(self, usual: float) -> float:
        """p of rise ~ cut^p, from the two measured cuts whose rises are nearest to the limit; `usual` without two."""
        near = sorted(self.points, key=lambda p: abs(math.log(self._floored(p.rise) / self.limit)))[:2]
        if len(near) < 2 or near[0].cut == near[1].cut:
            return usual
        (x, y), (u, v) = ((math.log(p.cut), math.log(self._floored(p.rise))) for p in near)
        return min(STEEPEST, max(FLATTEST, (y - v) / (x - u)))

    def _floored(self, rise: float) -> float:
        return max(rise, FLOOR * self.limit)

    def proposal(self, aim: float, usual: float, most: int) -> tuple[int, float]:
        """The next cut to measure, at most `most`, and the rise to expect there.

        Rises are taken for a power of the cut: between a cut within the limit and one above it for the power that goes
        through both, else for that of `exponent`.
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
        """Whether the last two cuts between one within the limit and one above it have left more than half the gap."""
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
    """Measure cuts until one is found that rises by at most `limit`, and the next larger one by more.

    Args:
        measure: the rise of the log perplexity by a cut.
        limit: above 0.
        most: the largest cut; cuts are 1 to `most`.
        first: the cut that is measured first, and `expected`, the rise that there is reason to expect of it.
        exponent: p of rise ~ cut^p, until two cuts have been measured.
        unused: share of the limit that the best cut may leave unused; the search ends there. 0: it ends at the last
            cut that keeps the limit, of which a curve that rises has one.
        tries: measurements after which the best cut so far will do; more follow while there is none.

    Returns:
        What was measured; without a `best`, not even a cut of 1 keeps the limit.
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
