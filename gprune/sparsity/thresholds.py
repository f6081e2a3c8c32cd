"""Thresholds of modules: initial values, and conversion to masks under a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from gprune.models.masks import Masks
from gprune.partition.modules import ModuleRanks
from gprune.sparsity.budget import Budget
from gprune.sparsity.cut import keep_masks

# Per block, in logits: (K,) for modules of neurons, and (1,) for the KV groups, which are one module.
Thresholds = tuple[list[Tensor], list[Tensor]]


def start_thresholds(masks: Masks, ranks: ModuleRanks) -> Thresholds:
    """Return thresholds, float64, at which each module keeps as many units as in the masks.

    t_m = logit(removed fraction); the fraction is kept a quarter of a rank away from 0 and 1, where the logit is
    infinite. If all modules rank by the base metric, these thresholds reproduce the base masks exactly.
    """

    def thresholds(keep: Tensor, labels: Tensor, K: int) -> Tensor:
        n = torch.bincount(labels, minlength=K).double().clamp_min(1)  # finite without KV groups
        removed = torch.bincount(labels[~keep], minlength=K).double()
        return torch.logit(removed.clamp(min=torch.tensor(0.25), max=n - 0.25) / n)

    ffn = [thresholds(m, y, k) for m, y, k in zip(masks.ffn, ranks.labels, ranks.modules, strict=True)]
    attention = [thresholds(m, torch.zeros(len(m), dtype=torch.long), 1) for m in masks.attention]
    return ffn, attention


def unit_margins(ranks: ModuleRanks, thresholds: Thresholds) -> tuple[list[Tensor], list[Tensor]]:
    """Return margins logit p_i - t_m per block, of neurons and of KV groups, float64. All inputs are on one device."""
    ffn, attention = ([t.detach() for t in kind] for kind in thresholds)
    neurons, groups = ranks.logits
    return (
        [x - t[y].double() for x, t, y in zip(neurons, ffn, ranks.labels, strict=True)],
        [x - t.double() for x, t in zip(groups, attention, strict=True)],
    )


def masks_from_thresholds(ranks: ModuleRanks, thresholds: Thresholds, budget: Budget) -> Masks:
    """Return keep masks that meet the budget, from thresholds per module."""
    return keep_masks(budget, *unit_margins(ranks, thresholds))


def named_thresholds(thresholds: Thresholds) -> dict[str, Tensor]:
    """Return thresholds by their names in safetensors files: `ffn.<block>` and `attention.<block>`."""
    pairs = zip(("ffn", "attention"), thresholds, strict=True)
    return {f"{kind}.{b}": t.detach().cpu() for kind, group in pairs for b, t in enumerate(group)}


def thresholds_from_named(tensors: dict[str, Tensor]) -> Thresholds | None:
    """Return thresholds from the result of `named_thresholds`, or None without any. Other names are ignored."""
    depth = sum(name.startswith("ffn.") for name in tensors)
    kinds = ("ffn", "attention")
    return tuple([tensors[f"{kind}.{b}"] for b in range(depth)] for kind in kinds) if depth else None
