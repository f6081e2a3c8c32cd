"""Find the modules whose activations cannot be trusted, and rank neurons inside modules.

If a module is sensitive to the distribution *and* weakly activated, the importance order inside it says more about the
calibration text than about its neurons. Such a module takes its order from a fallback: a metric that needs no
activations or, beyond the paper, the base metric on all drift corpora (`consensus`, `averaged`). Whether it does is a
switch or, with `softness`, a degree: then ranks are mixed. Our reading of GPrune-LLM (arXiv 2603.13418).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gprune.partition.drift import fractional_ranks


@dataclass(frozen=True)
class ModuleReliability:
    """Per module of one block, K entries each."""

    size: Tensor  # (K,) neurons
    score: Tensor  # (K,) mean within-block rank on corpora.score, (0, 1)
    sensitivity: Tensor  # (K,) mean rank drift
    noise: Tensor  # (K,) mean noise floor
    switched: Tensor  # (K,) bool: sensitive, weakly activated, and sensitive beyond noise
    weight: Tensor | None = None  # (K,) float64 in [0, 1], of the fallback; None in earlier runs: 1 where switched

    def __post_init__(self) -> None:
        if self.weight is None:
            object.__setattr__(self, "weight", self.switched.double())


def module_means(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of values (N,) inside each module, (K,) float64; labels (N,) in [0, K)."""
    K = int(labels.max()) + 1
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
    softness: float = 0.0,
) -> list[ModuleReliability]:
    """Mark the modules whose activations cannot be trusted, and weigh their fallback; one record per block.

    A module switches to the fallback if its sensitivity, standardised over the neurons of its block, reaches the
    `sensitivity_quantile` of all modules of the model, its score does not exceed the `score_quantile`, and its mean
    drift is above its mean noise floor.

    With softness S > 0 the fallback weighs w_m = sigmoid(a / S) sigmoid(b / S) sigmoid(c / S), where a, b and c say by
    how much the module is past these three limits, in standard deviations over the neurons of its block (of drift, and
    of ranks, which are uniform: 1 / sqrt 12). So w_m rises with sensitivity and falls with activation; S -> 0 is the
    switch.

    Args:
        labels: per block (N,) module of each neuron.
        ranks: per block (N,) fractional ranks on `corpora.score`.
        drifts, floors: per block (N,) rank drift and its noise floor.
        sensitivity_quantile, score_quantile: in [0, 1].
        switch: which modules are marked: none, those above, or all, which is the control of the switch.
        softness: S; with `unreliable` only.
    """
    scores = [module_means(r, y) for r, y in zip(ranks, labels, strict=True)]
    sensitivity = [module_means(d, y) for d, y in zip(drifts, labels, strict=True)]
    noise = [module_means(f, y) for f, y in zip(floors, labels, strict=True)]
    spread = [d.std().clamp_min(1e-12) for d in drifts]
    standard = [(s - d.mean()) / std for s, d, std in zip(sensitivity, drifts, spread, strict=True)]
    high = torch.cat(standard).quantile(sensitivity_quantile)
    low = torch.cat(scores).quantile(score_quantile)
    records = []
    for y, score, s, z, floor, std in zip(labels, scores, sensitivity, standard, noise, spread, strict=True):
        switched = {
            "off": torch.zeros_like(z, dtype=torch.bool),
            "unreliable": (z >= high) & (score <= low) & (s > floor),
            "everywhere": torch.ones_like(z, dtype=torch.bool),
        }[switch]
        weight = None
        if softness and switch == "unreliable":
            past = torch.stack([z - high, (low - score) * math.sqrt(12), (s - floor) / std])
            weight = torch.sigmoid(past / softness).prod(0)
        records.append(ModuleReliability(torch.bincount(y), score, s, floor, switched, weight))
    return records


def switched_share(records: list[ModuleReliability]) -> float:
    """Weight of the fallback (`--reliability.metric`), mean over neurons: the fraction that ranks by it, if no module
    ranks by a mixture.
    """
    switched = sum(float((r.size * r.weight).sum()) for r in records)
    return switched / sum(int(r.size.sum()) for r in records)


def within_module_ranks(scores: Tensor, fallback: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """p_i = (rank of i inside its module + 0.5) / n_m, in (0, 1), (N,) float64; every rank once, larger = keep.

    Args:
        scores: (N,) importance on `corpora.score`.
        fallback: (N,) importance by `--reliability.metric`.
        labels: (N,) modules in [0, K).
        weight: w, (K,) bool or in [0, 1]: the order is that of (1 - w_m) r_i + w_m f_i, where r and f are the
            fractional ranks of scores and fallback among the module's own neurons.

    Ties go by index, so that the ranks inside a module are always 0..n_m - 1: a budget needs an order.
    """
    p = torch.empty(len(scores), dtype=torch.float64)
    for k, w in enumerate(weight.double()):
        members = (labels == k).nonzero()[:, 0]
        mixed = (1 - w) * fractional_ranks(scores[members]) + w * fractional_ranks(fallback[members])
        order = mixed.argsort(stable=True)
        p[members[order]] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return p
