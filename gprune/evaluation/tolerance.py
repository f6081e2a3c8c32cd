"""The largest removed share at which perplexity stays within a limit, interpolated on a curve over shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple


class UpTo(NamedTuple):
    """A removed share; `at_least` if the curve ends before the limit is reached."""

    value: float
    at_least: bool

    def __str__(self) -> str:
        digits = 1 if self.value < 0.01 else 0
        return f"{'at least ' * self.at_least}{100 * self.value:.{digits}f} %"


def largest_share(perplexity: Mapping[float, float], ratio: float) -> UpTo | None:
    """Return the largest share up to which perplexity stays within `ratio` times that of share 0.

    log perplexity is made monotone (running maximum) and interpolated linearly between the measured shares. Measured
    curves are convex, so the interpolation lies above the curve and the result is a lower estimate.

    Args:
        perplexity: removed share -> perplexity; share 0 is the dense model.
        ratio: limit of the perplexity relative to the dense model, above 1.

    Returns:
        The share; None if share 0 or all other shares are missing.
    """
    shares = sorted(perplexity)
    if len(shares) < 2 or shares[0] != 0:
        return None
    limit, rise = math.log(ratio), 0.0
    for before, share in itertools.pairwise(shares):
        last, rise = rise, max(rise, math.log(perplexity[share] / perplexity[0]))
        if rise > limit:
            return UpTo(before + (share - before) * (limit - last) / (rise - last), False)
    return UpTo(shares[-1], True)
