"""How much can be removed before perplexity rises by so much: read off a curve over shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple


class UpTo(NamedTuple):
    """A share, and whether the curve ends before the limit is reached."""

    value: float
    at_least: bool

    def __str__(self) -> str:
        digits = 1 if self.value < 0.01 else 0
        return f"{'at least ' * self.at_least}{100 * self.value:.{digits}f} %"


def largest_share(perplexity: Mapping[float, float], ratio: float) -> UpTo | None:
    """Return the largest share up to which perplexity stays within `ratio` times that of share 0.

    log perplexity is interpolated linearly between the shares that were measured, after it was made monotone: a point
    counts at least as much as all points before it. On a curve that bends upwards, as measured ones do, the line lies
    above the curve, so the share is rather too small than too large.

    Args:
        perplexity: by share; 0 is the dense model.
        ratio: above 1.

    Returns:
        The share; None without the dense model or without another point.
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
