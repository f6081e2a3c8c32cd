"""Means and ratios of perplexities and the generalisation gap, with 95 % intervals by bootstrap over windows."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Nll = dict[str, list[float]]  # corpus -> summed negative log-likelihood per window, nats


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean logarithm; NaN without values."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else float("nan")


def generalisation_gap(pruned: dict[str, float], dense: dict[str, float], seen: dict[str, bool]) -> float:
    """(geometric mean of pruned/dense perplexity over unseen corpora) / (the same over seen corpora).

    Above 1, pruning did more harm on text that it had not seen. NaN without corpora of both kinds.
    """
    ratios = {corpus: pruned[corpus] / dense[corpus] for corpus in pruned}
    unseen = geometric_mean(ratio for corpus, ratio in ratios.items() if not seen[corpus])
    return unseen / geometric_mean(ratio for corpus, ratio in ratios.items() if seen[corpus])


def paired_bootstrap_ratio(
    a: Nll, b: Nll, tokens_per_window: int, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Geometric-mean perplexity of model a over model b's: (ratio, lower, upper), a 95 % interval over windows.

    Args:
        a, b: of both models on the same windows; windows are resampled within each corpus, jointly for both models.
        tokens_per_window: predicted tokens per window.
    """
    point, total = _bootstrap_log_ratio(a, b, tokens_per_window, draws=draws, seed=seed)
    return math.exp(point), *_interval(total)


def _bootstrap_log_ratio(a: Nll, b: Nll, tokens_per_window: int, *, draws: int, seed: int) -> tuple[float, Tensor]:
    """Log of the ratio of geometric means, and its (draws,) float64 bootstrap replicates."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(draws, dtype=torch.float64)
    point = 0.0
    for corpus in a:
        difference = torch.tensor(a[corpus], dtype=torch.float64) - torch.tensor(b[corpus], dtype=torch.float64)
        pick = torch.randint(len(difference), (draws, len(difference)), generator=generator)
        total += difference[pick].mean(1) / tokens_per_window
        point += float(difference.mean()) / tokens_per_window
    return point / len(a), total / len(a)


def _interval(logs: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(logs, torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    return low, high


def bootstrap_gap(
    pruned: Nll, dense: Nll, seen: dict[str, bool], tokens_per_window: int, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """`generalisation_gap` as (gap, lower, upper), a 95 % interval over windows; NaN without corpora of both kinds.

    Seen and unseen text are resampled independently of each other.
    """
    found = []
    for kind in (False, True):
        a, b = ({c: nll[c] for c in nll if seen[c] == kind} for nll in (pruned, dense))
        if not a:
            return (math.nan,) * 3
        found.append(_bootstrap_log_ratio(a, b, tokens_per_window, draws=draws, seed=seed + kind))
    (unseen, unseen_draws), (known, known_draws) = found
    return math.exp(unseen - known), *_interval(unseen_draws - known_draws)


def bootstrap_perplexity(
    nll: Nll, tokens_per_window: int, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Geometric-mean perplexity of one model over corpora: (perplexity, lower, upper), a 95 % interval over windows."""
    certain = {corpus: [0.0] * len(values) for corpus, values in nll.items()}  # perplexity 1, without noise
    return paired_bootstrap_ratio(nll, certain, tokens_per_window, draws=draws, seed=seed)
