"""Rank drift, the variation of a neuron's importance rank between text distributions, and its noise floor."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor

MIN_AGREEMENT_SIZE = 16  # Kendall's tau of fewer neurons is mostly noise


def rank_drift(ranks: Tensor) -> Tensor:
    """Population standard deviation of each neuron's rank over corpora: ranks (D, N) in (0, 1) -> (N,) in [0, 0.5].

    Our reading of GPrune-LLM's abstract and its Figure 1 (arXiv 2603.13418).
    """
    return ranks.std(dim=0, correction=0)


def noise_floor(half_ranks: Tensor) -> Tensor:
    """Drift caused by sampling alone: half_ranks (D, 2, N) from two halves of each corpus -> (N,).

    A rank from half of the tokens has twice the sampling variance of a rank from all tokens, so (difference / 2)^2 of
    two halves estimates the variance v of a full-sample rank. If D corpora differ by sampling only, their population
    variance has the expectation (D - 1)/D * v. Our reading.
    """
    D = len(half_ranks)
    variance = ((half_ranks[:, 0] - half_ranks[:, 1]) / 2).square().mean(0)
    return ((D - 1) / D * variance).sqrt()


def kendall_agreement(scores: Tensor) -> float:
    """Kendall's tau-b of the scores of n neurons, averaged over pairs of corpora: scores (D, n) -> [-1, 1].

    NaN (undefined) for constant scores, fewer than two corpora or fewer than 16 neurons.
    """
    D, n = scores.shape
    if n < MIN_AGREEMENT_SIZE or D < 2:
        return float("nan")
    values = scores.detach().cpu().numpy()
    if (values.min(1) == values.max(1)).any():
        return float("nan")
    return float(np.mean([kendalltau(values[a], values[b]).statistic for a, b in combinations(range(D), 2)]))


def half_agreement(half_ranks: Tensor) -> Tensor:
    """Kendall's tau-b between the two halves of a corpus, averaged over corpora: half_ranks (D, 2, N) -> () float64.

    A lower bound for the agreement of corpora that differ by sampling only, because a half has twice the sampling
    variance of the whole. Halves are the first and the last windows of a shuffled sample, and share at most one piece
    of text. NaN if `kendall_agreement` is NaN.
    """
    return torch.tensor([kendall_agreement(pair) for pair in half_ranks], dtype=torch.float64).mean()


def module_agreements(scores: Tensor, labels: Tensor) -> Tensor:
    """Kendall agreement in each module: scores (D, N), labels (N,) in [0, K) -> (K,) float64, NaN if undefined."""
    return torch.tensor(
        [kendall_agreement(scores[:, labels == k]) for k in range(int(labels.max()) + 1 if len(labels) else 0)],
        dtype=torch.float64,
    )
