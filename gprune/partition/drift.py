"""Rank drift, the variation of a neuron's importance rank between text distributions, and its noise floor."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor

from gprune.partition.modules import count_modules

MIN_AGREEMENT_SIZE = 16  # Kendall's tau of fewer neurons is mostly noise


def rank_drift(ranks: Tensor) -> Tensor:
    """Return the population standard deviation over corpora of each neuron's rank, (N,), from ranks (D, N) in (0, 1).

    Our reading of GPrune-LLM's abstract and its Figure 1 (arXiv 2603.13418).
    """
    return ranks.std(dim=0, correction=0)


def noise_floor(half_ranks: Tensor) -> Tensor:
    """Return the drift that sampling alone causes, (N,), from ranks on the two halves of D corpora, (D, 2, N).

    A rank from half of the tokens has twice the sampling variance of a rank from all tokens, so (difference / 2)^2 of
    two halves estimates the variance v of a full-sample rank. If D corpora differ by sampling only, their population
    variance has the expectation (D - 1)/D * v. Our reading.
    """
    D = len(half_ranks)
    variance = ((half_ranks[:, 0] - half_ranks[:, 1]) / 2).square().mean(0)
    return ((D - 1) / D * variance).sqrt()


def kendall_agreement(scores: Tensor) -> float:
    """Return Kendall's tau-b of scores (D, n) between corpora, averaged over pairs of corpora, in [-1, 1].

    NaN (undefined) for constant scores, fewer than two corpora or fewer than `MIN_AGREEMENT_SIZE` neurons.
    """
    D, n = scores.shape
    if n < MIN_AGREEMENT_SIZE or D < 2:
        return float("nan")
    values = scores.detach().cpu().numpy()
    if (values.min(1) == values.max(1)).any():
        return float("nan")
    taus = [kendalltau(one, other).statistic for one, other in combinations(values, 2)]
    return float(np.mean(taus))


def half_agreement(half_ranks: Tensor) -> Tensor:
    """Return Kendall's tau-b between the halves of a corpus, averaged over corpora, () float64, from ranks (D, 2, N).

    A lower bound for the agreement of corpora that differ by sampling only, because a half has twice the sampling
    variance of the whole. Halves are the first and the last windows of a shuffled sample, and share at most one piece
    of text. NaN if `kendall_agreement` of a corpus is NaN.
    """
    by_corpus = [kendall_agreement(halves) for halves in half_ranks]
    return torch.tensor(by_corpus, dtype=torch.float64).mean()


def module_agreements(scores: Tensor, labels: Tensor) -> Tensor:
    """Return `kendall_agreement` of scores (D, N) in each module, (K,) float64, for labels (N,) in [0, K)."""
    by_module = [kendall_agreement(scores[:, labels == k]) for k in range(count_modules(labels))]
    return torch.tensor(by_module, dtype=torch.float64)
