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
        """Return the thresholds of a block's K modules, (K,), from its keep mask and the module of each unit."""
        sizes = torch.bincount(labels, minlength=K).double().clamp_min(1)  # 1 avoids 0 / 0 without KV groups
        removed = torch.bincount(labels[~keep], minlength=K).double()
        return torch.logit(removed.clamp(min=torch.tensor(0.25), max=sizes - 0.25) / sizes)

    blocks = zip(masks.ffn, ranks.labels, ranks.modules, strict=True)
    ffn = [thresholds(keep, labels, K) for keep, labels, K in blocks]
    # The KV groups of a block are one module.
    attention = [thresholds(keep, torch.zeros(len(keep), dtype=torch.long), 1) for keep in masks.attention]
    return ffn, attention


def unit_margins(ranks: ModuleRanks, thresholds: Thresholds) -> tuple[list[Tensor], list[Tensor]]:
    """Return margins logit p_i - t_m per block, of neurons (N,) and of KV groups (G,), float64."""
    neuron_logits, group_logits = ranks.logits
    ffn_thresholds, attention_thresholds = thresholds
    blocks = zip(neuron_logits, ffn_thresholds, ranks.labels, strict=True)
    neurons = [logits - t.detach()[labels].double() for logits, t, labels in blocks]
    groups = [logits - t.detach().double() for logits, t in zip(group_logits, attention_thresholds, strict=True)]
    return neurons, groups


def masks_from_thresholds(ranks: ModuleRanks, thresholds: Thresholds, budget: Budget) -> Masks:
    """Return keep masks that meet the budget, from thresholds per module."""
    neuron_margins, group_margins = unit_margins(ranks, thresholds)
    return keep_masks(budget, neuron_margins, group_margins)


def named_thresholds(thresholds: Thresholds) -> dict[str, Tensor]:
    """Return thresholds by their names in safetensors files: `ffn.<block>` and `attention.<block>`."""
    named = {}
    for kind, by_block in zip(("ffn", "attention"), thresholds, strict=True):
        named |= {f"{kind}.{b}": t.detach().cpu() for b, t in enumerate(by_block)}
    return named


def thresholds_from_named(tensors: dict[str, Tensor]) -> Thresholds | None:
    """Return thresholds from the result of `named_thresholds`; None if it has none. Other names are ignored."""
    blocks = sum(name.startswith("ffn.") for name in tensors)
    if not blocks:
        return None
    return [tensors[f"ffn.{b}"] for b in range(blocks)], [tensors[f"attention.{b}"] for b in range(blocks)]
