"""The largest removed share at which perplexity stays within a limit, interpolated on a curve over shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple


class LargestShare(NamedTuple):
    """The largest removed share within a limit."""

    value: float
    at_least: bool  # whether the curve ends before the limit is reached

    def __str__(self) -> str:
        digits = 1 if self.value < 0.01 else 0
        prefix = "at least " if self.at_least else ""
        return f"{prefix}{100 * self.value:.{digits}f} %"


def largest_share(perplexity: Mapping[float, float], ratio: float) -> LargestShare | None:
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
    limit = math.log(ratio)
    rise = 0.0  # running maximum of log(perplexity / dense perplexity)
    for former_share, share in itertools.pairwise(shares):
        former_rise = rise
        rise = max(former_rise, math.log(perplexity[share] / perplexity[0]))
        if rise > limit:
            crossing = former_share + (share - former_share) * (limit - former_rise) / (rise - former_rise)
            return LargestShare(crossing, at_least=False)
    return LargestShare(shares[-1], at_least=True)
