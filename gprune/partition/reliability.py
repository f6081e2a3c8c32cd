"""Find the modules whose activations cannot be trusted, and rank neurons inside modules.

If a module is sensitive to the distribution *and* weakly activated, the importance order inside it says more about the
calibration text than about its neurons. Such a module takes its order from a fallback: a metric that needs no
activations or, beyond the paper, the base metric on all drift corpora (`consensus`, `averaged`). Our reading of
GPrune-LLM (arXiv 2603.13418). A module takes one order or the other: a weighted mean of both gained nothing (the log).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModuleReliability:
    """Per module of one block, K entries each."""

    size: Tensor  # (K,) neurons
    score: Tensor  # (K,) mean within-block rank on corpora.score, (0, 1)
    sensitivity: Tensor  # (K,) mean rank drift
    noise: Tensor  # (K,) mean noise floor
    switched: Tensor  # (K,) bool: sensitive, weakly activated, and sensitive beyond noise


def count_modules(labels: Tensor) -> int:
    """Modules of labels (N,) in [0, K): K, or 0 for a block without neurons."""
    return int(labels.max()) + 1 if len(labels) else 0


def module_means(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of values (N,) inside each module, (K,) float64; labels (N,) in [0, K)."""
    K = count_modules(labels)
    total = torch.zeros(K, dtype=torch.float64).index_add_(0, labels, values.double())
    return total / torch.bincount(labels, minlength=K)


def assess_reliability(
    labels: list[Tensor],
    ranks: list[Tensor],
    drifts: list[Tensor],
    floors: list[Tensor],
    *,
    sensitivity_quantile: float = 0.75,
    score_quantile: float = 0.5,
    switch: Literal["off", "unreliable", "everywhere"] = "unreliable",
) -> list[ModuleReliability]:
    """Mark the modules whose activations cannot be trusted, block by block.

    A module switches to the fallback if its sensitivity, standardised over the neurons of its block, reaches the
    `sensitivity_quantile` of all modules of the model, its score does not exceed the `score_quantile`, and its mean
    drift is above its mean noise floor.

    Args:
        labels, ranks, drifts, floors: per block (N,): modules, fractional ranks on `corpora.score`, rank drift and its
            noise floor.
        switch: which modules are marked: none, those described above, or all, as a control.
    """
    scores = [module_means(r, y) for r, y in zip(ranks, labels, strict=True)]
    sensitivity = [module_means(d, y) for d, y in zip(drifts, labels, strict=True)]
    noise = [module_means(f, y) for f, y in zip(floors, labels, strict=True)]
    pairs = zip(sensitivity, drifts, strict=True)
    standard = [(s - d.mean()) / d.std().clamp_min(1e-12) if len(d) else s for s, d in pairs]  # some have no FFN
    high = torch.cat(standard).quantile(sensitivity_quantile)
    low = torch.cat(scores).quantile(score_quantile)
    reliability = []
    for y, score, s, z, floor in zip(labels, scores, sensitivity, standard, noise, strict=True):
        if switch == "unreliable":
            switched = (z >= high) & (score <= low) & (s > floor)
        else:
            switched = torch.full_like(z, switch == "everywhere", dtype=torch.bool)
        reliability.append(ModuleReliability(torch.bincount(y), score, s, floor, switched))
    return reliability


def switched_share(reliability: list[ModuleReliability]) -> float:
    """Fraction of all neurons that rank by the fallback, `--reliability.metric`."""
    switched = sum(int(r.size[r.switched].sum()) for r in reliability)
    return switched / sum(int(r.size.sum()) for r in reliability)


def within_module_ranks(scores: Tensor, fallback: Tensor, labels: Tensor, switched: Tensor) -> Tensor:
    """p_i = (rank of i inside its module + 0.5) / n_m, in (0, 1), (N,) float64; every rank once, larger = keep.

    Args:
        scores, fallback: (N,) importance on `corpora.score`, and by `--reliability.metric`.
        labels: (N,) modules in [0, K).
        switched: (K,) bool, the modules that take the order of the fallback.

    Ties go by index, so that the ranks inside a module are always 0..n_m - 1: a budget needs an order.
    """
    p = torch.empty(len(scores), dtype=torch.float64)
    for k, other in enumerate(switched.tolist()):
        members = (labels == k).nonzero()[:, 0]
        order = (fallback if other else scores)[members].argsort(stable=True)
        p[members[order]] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return p
