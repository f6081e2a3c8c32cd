"""The largest removed shares at which perplexity stays within a limit, interpolated on a curve over shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from gprune.evaluation.intervals import geometric_mean

TOLERATED_PERCENT = 3, 10  # percent of perplexity above dense


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
    `perplexity` is by removed share, and share 0 is the dense model. None if share 0 or all other shares are missing.
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


def tolerated_shares(curve: Mapping[str, Mapping[str, float]], scope: str, *, recovered: bool) -> dict[str, Any] | None:
    """Return the largest shares at which masks alone raise development perplexity by at most 3 % and 10 %, and a line.

    `curve` is removed share -> corpus -> perplexity, as measured after learning. None for a curve without points.
    """
    means = {float(share): geometric_mean(by_corpus.values()) for share, by_corpus in curve.items() if by_corpus}
    shares = {percent: largest_share(means, 1 + percent / 100) for percent in TOLERATED_PERCENT}
    if None in shares.values():
        return None
    (lowest_percent, lowest_share), *others = shares.items()
    limits = [f"within {lowest_percent} % of dense up to {lowest_share} of {scope}"]
    limits += [f"within {percent} % up to {share}" for percent, share in others if share != lowest_share]
    condition = ", under masks without recovery" if recovered else ""
    sentence = f"Development perplexity stays {', '.join(limits)}{condition}."
    return {"said": sentence, "shares": {str(percent): share.value for percent, share in shares.items()}}
