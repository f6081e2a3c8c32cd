"""Means and ratios of perplexities, and the generalisation gap, with 95 % confidence intervals (Student's t).

Each quantity is a weighted sum of means over windows, with one mean per corpus, or exp of such a sum. With few windows
bootstrap intervals are too narrow: for 3 windows of each of 4 corpora 83 % of them contain the true value (BCa is not
better), compared with 95 % of the intervals here (`python -m experiments.intervals`). The variance of a corpus with a
single window cannot be estimated, so there is no interval then: both ends are None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student


class Estimate(NamedTuple):
    """A number with an optional 95 % confidence interval."""

    value: float
    low: float | None = None
    high: float | None = None


LARGEST = 1e300  # largest bound of an interval; records cannot store infinity
Nll = Mapping[str, list[float]]  # corpus -> summed negative log-likelihood per window, nats
Interval = tuple[float, float | None, float | None]  # value, lower and upper end; None without an interval


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean: exp of the mean logarithm; NaN without values."""
    logs = [math.log(value) for value in values]
    if not logs:
        return math.nan
    return math.exp(sum(logs) / len(logs))


def mean_perplexity(nll: Nll, tokens_per_window: int) -> Interval:
    """Return the geometric-mean perplexity of one model over corpora: (perplexity, lower, upper)."""
    return _exp_of(mean_per_token(nll, tokens_per_window, smallest=-math.inf))


def mean_per_token(sums: Nll, tokens_per_window: int, *, smallest: float = 0.0, largest: float = math.inf) -> Interval:
    """Return the mean over corpora of a quantity per token, such as KL in nats: (mean, lower, upper).

    The interval is cut off at the limits of the quantity. No possible value is excluded, so the interval contains the
    true value as often as before (Mandelkern 2002, Statistical Science 17, 149-172).
    """
    equal_weights = dict.fromkeys(sums, 1 / len(sums))
    mean, low, high = _interval(sums, equal_weights, tokens_per_window)
    return (mean, None, None) if low is None else (mean, max(smallest, low), min(largest, high))


def paired_ratio(a: Nll, b: Nll, tokens_per_window: int) -> Interval:
    """Return the ratio of the geometric-mean perplexities of models a and b: (ratio, lower, upper)."""
    return mean_perplexity(differences(a, b), tokens_per_window)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float | None]:
    """Return the difference of the mean scores of models a and b on the same questions, and its standard error.

    A score is a number, or whether an answer is correct. The standard error is None for fewer than two questions.
    """
    by_question = [float(of_a) - float(of_b) for of_a, of_b in zip(a, b, strict=True)]
    n = len(by_question)
    mean = sum(by_question) / n
    if n < 2:
        return mean, None
    variance = sum((difference - mean) ** 2 for difference in by_question) / (n - 1)
    return mean, math.sqrt(variance / n)


def paired_gap(pruned: Nll, dense: Nll, seen: Mapping[str, bool], tokens_per_window: int) -> Interval:
    """Return the generalisation gap, paired over windows: (gap, lower, upper).

    It is the geometric mean of pruned/dense perplexity over unseen corpora, divided by that over seen corpora. Above 1,
    pruning did more harm on unseen text. NaN unless there are both seen and unseen corpora.
    """
    seen_corpora = sum(seen[corpus] for corpus in pruned)
    unseen_corpora = len(pruned) - seen_corpora
    if not seen_corpora or not unseen_corpora:
        return (math.nan,) * 3
    weights = {corpus: -1 / seen_corpora if seen[corpus] else 1 / unseen_corpora for corpus in pruned}
    return _exp_of(_interval(differences(pruned, dense), weights, tokens_per_window))


def _exp_of(interval: Interval) -> Interval:
    """Return exp of a value and of the ends of its interval."""
    value, low, high = interval
    return (_exp(value), None, None) if low is None else (_exp(value), _exp(low), _exp(high))


def _exp(value: float) -> float:
    """Return exp of a value, but at most `LARGEST`. Above 709 math.exp raises OverflowError."""
    return math.exp(value) if value < 690 else LARGEST  # exp(690) is a little less


def differences(a: Nll, b: Nll) -> Nll:
    """Return the differences a - b, window by window, for each corpus of a."""
    return {corpus: [x - y for x, y in zip(a[corpus], b[corpus], strict=True)] for corpus in a}


def _interval(sums: Nll, weights: Mapping[str, float], tokens_per_window: int) -> Interval:
    """Return a weighted sum of means over windows with its 95 % confidence interval: (sum, lower, upper).

    With mean m_c and variance s_c^2 of the n_c windows of corpus c, and its weight w_c:
        S = sum_c w_c m_c,    V_c = w_c^2 s_c^2 / n_c,
        interval S -+ t(0.975, v) sqrt(sum_c V_c),
        v = (sum_c V_c)^2 / sum_c (V_c^2 / (n_c - 1)), Welch-Satterthwaite.
    There is no interval if a corpus has a single window, whose variance cannot be estimated. If all variances are 0,
    the interval is the sum alone.
    """
    per_token = {corpus: np.array(sums[corpus]) / tokens_per_window for corpus in weights}
    point = 0.0
    for corpus, weight in weights.items():
        point += weight * float(per_token[corpus].mean())
    if any(len(values) == 1 for values in per_token.values()):
        return point, None, None
    variances: list[float] = []  # V_c
    window_freedoms: list[int] = []  # n_c - 1
    for corpus, weight in weights.items():
        values = per_token[corpus]
        variances.append(weight**2 * float(values.var(ddof=1)) / len(values))
        window_freedoms.append(len(values) - 1)
    variance = sum(variances)
    if not variance > 0:
        return (point,) * 3
    degrees_of_freedom = variance**2 / sum(
        V**2 / freedom for V, freedom in zip(variances, window_freedoms, strict=True)
    )
    half_width = float(student.ppf(0.975, degrees_of_freedom)) * math.sqrt(variance)
    return point, point - half_width, point + half_width
