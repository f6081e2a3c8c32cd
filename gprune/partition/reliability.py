"""Find modules with unreliable activations, and rank neurons inside modules.

If a module is sensitive to the text distribution *and* weakly activated, the importance order of its neurons depends
more on the calibration text than on the neurons. Such a module is ranked by a fallback: a metric that does not use
activations or, beyond the paper, the base metric over all drift corpora (`consensus`, `averaged`). Our reading of
GPrune-LLM (arXiv 2603.13418). A weighted mean of both orders was not better (experiments/questions).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModuleReliability:
    """Reliability of the K modules of a block."""

    size: Tensor  # (K,) neurons
    score: Tensor  # (K,) mean within-block rank on corpora.score, (0, 1)
    sensitivity: Tensor  # (K,) mean rank drift
    noise: Tensor  # (K,) mean noise floor
    switched: Tensor  # (K,) bool: sensitive, weakly activated, and sensitive beyond noise


def count_modules(labels: Tensor) -> int:
    """Number of modules K of labels (N,) in [0, K); 0 for a block without neurons."""
    return int(labels.max()) + 1 if len(labels) else 0


def module_means(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of values (N,) in each module, (K,) float64; labels (N,) in [0, K)."""
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
    """Find the modules with unreliable activations, block by block.

    A module switches to the fallback if all of these hold: its sensitivity, standardised over the neurons of its
    block, is at least the `sensitivity_quantile` of all modules of the model; its score is at most the
    `score_quantile`; its mean drift is above its mean noise floor.

    Args:
        labels, ranks, drifts, floors: (N,) per block: modules, fractional ranks on `corpora.score`, rank drift and its
            noise floor.
        switch: which modules switch: none, the unreliable ones, or all (a control).
    """
    scores = [module_means(r, y) for r, y in zip(ranks, labels, strict=True)]
    sensitivity = [module_means(d, y) for d, y in zip(drifts, labels, strict=True)]
    noise = [module_means(f, y) for f, y in zip(floors, labels, strict=True)]
    pairs = zip(sensitivity, drifts, strict=True)
    # A block may have no FFN.
    standard = [(s - d.mean()) / d.std().clamp_min(1e-12) if len(d) else s for s, d in pairs]
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
    """Share of all neurons that are ranked by the fallback `--reliability.metric`."""
    switched = sum(int(r.size[r.switched].sum()) for r in reliability)
    return switched / sum(int(r.size.sum()) for r in reliability)


def within_module_ranks(scores: Tensor, fallback: Tensor, labels: Tensor, switched: Tensor) -> Tensor:
    """Fractional rank of each neuron in its module: p_i = (rank + 0.5) / n_m in (0, 1), (N,) float64; larger is kept.

    Ties are broken by index, so the ranks of a module are always 0..n_m - 1, as a budget requires a total order.

    Args:
        scores, fallback: (N,) importance on `corpora.score`, and by `--reliability.metric`.
        labels: (N,) modules in [0, K).
        switched: (K,) bool, the modules that are ranked by the fallback.
    """
    p = torch.empty(len(scores), dtype=torch.float64)
    for k, other in enumerate(switched.tolist()):
        members = (labels == k).nonzero()[:, 0]
        order = (fallback if other else scores)[members].argsort(stable=True)
        p[members[order]] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return p
