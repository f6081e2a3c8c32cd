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
    """Return the number of modules K of labels (N,) in [0, K); 0 for a block without neurons."""
    return int(labels.max()) + 1 if len(labels) else 0


def module_means(values: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of values (N,) in each module, (K,) float64; labels (N,) in [0, K)."""
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
    """Find the modules with unreliable activations, from labels, ranks, drifts and noise floors, (N,) per block.

    A module switches to the fallback if all of these hold: its sensitivity, standardised over the neurons of its
    block, is at least the `sensitivity_quantile` of all modules of the model; its score is at most the
    `score_quantile`; its mean drift is above its mean noise floor.
    """
    scores = [module_means(*pair) for pair in zip(ranks, labels, strict=True)]
    sensitivities = [module_means(*pair) for pair in zip(drifts, labels, strict=True)]
    noises = [module_means(*pair) for pair in zip(floors, labels, strict=True)]
    standardised = []  # sensitivities, in standard deviations over the neurons of their block
    for sensitivity, drift in zip(sensitivities, drifts, strict=True):
        if len(drift):
            sensitivity = (sensitivity - drift.mean()) / drift.std().clamp_min(1e-12)
        standardised.append(sensitivity)  # empty for a block without an FFN
    sensitivity_limit = torch.cat(standardised).quantile(sensitivity_quantile)
    score_limit = torch.cat(scores).quantile(score_quantile)
    reliability = []
    blocks = zip(labels, scores, sensitivities, standardised, noises, strict=True)
    for block_labels, score, sensitivity, standardised_sensitivity, noise in blocks:
        if switch == "unreliable":
            is_sensitive = standardised_sensitivity >= sensitivity_limit
            switched = is_sensitive & (score <= score_limit) & (sensitivity > noise)
        else:
            switched = torch.full_like(score, switch == "everywhere", dtype=torch.bool)
        reliability.append(ModuleReliability(torch.bincount(block_labels), score, sensitivity, noise, switched))
    return reliability


def switched_share(reliability: list[ModuleReliability]) -> float:
    """Return the share of all neurons that are ranked by the fallback `--reliability.metric`."""
    switched = sum(int(block.size[block.switched].sum()) for block in reliability)
    neurons = sum(int(block.size.sum()) for block in reliability)
    return switched / neurons


def within_module_ranks(scores: Tensor, fallback: Tensor, labels: Tensor, switched: Tensor) -> Tensor:
    """Return the rank of each neuron in its module, p_i = (rank + 0.5) / n_m in (0, 1), (N,) float64; larger = keep.

    Ranks are by `scores` (N,), and by `fallback` (N,) in modules that `switched`, (K,) bool. Labels are (N,) in [0, K).

    Ties are broken by index, so the ranks of a module are always 0..n_m - 1, as a budget requires a total order.
    """
    p = torch.empty(len(scores), dtype=torch.float64)  # filled module by module
    for k, uses_fallback in enumerate(switched.tolist()):
        members = (labels == k).nonzero()[:, 0]
        importance = fallback if uses_fallback else scores
        order = importance[members].argsort(stable=True)
        p[members[order]] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return p
