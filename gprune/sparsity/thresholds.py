"""Thresholds per module: where they start, and the masks that they leave under a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gprune.models.masks import Masks
from gprune.sparsity.budget import UnitCosts
from gprune.sparsity.masks import keep_masks, margins


@dataclass(frozen=True)
class ModuleRanks:
    """Where units stand inside their modules: what thresholds act on. One entry per block.

    A block's KV groups form one module of their own.
    """

    ffn: list[Tensor]  # p, (N,) float64 in (0, 1)
    labels: list[Tensor]  # (N,) int64 in [0, K)
    attention: list[Tensor]  # p of KV groups, (G,) float64

    @property
    def modules(self) -> list[int]:
        return [int(y.max()) + 1 for y in self.labels]

    def moved(self, offsets: list[Tensor]) -> ModuleRanks:
        """Every neuron's rank moved by its offset, (N,) in logits: p_i' = sigmoid(logit p_i + o_i)."""
        ffn = [torch.sigmoid(torch.logit(p) + o.cpu()) for p, o in zip(self.ffn, offsets, strict=True)]
        return replace(self, ffn=ffn)


def start_thresholds(masks: Masks, ranks: ModuleRanks) -> tuple[list[Tensor], list[Tensor]]:
    """Thresholds under which each module keeps as many units as the masks keep of it.

    t_m = logit(removed fraction), moved a quarter of a rank inside (0, 1) where it would be infinite. Where modules
    rank by the base metric itself, the mask at the start is the base mask, unit for unit.

    Returns:
        Per block (K,) float64 for neurons and (1,) float64 for KV groups.
    """

    def thresholds(keep: Tensor, labels: Tensor, K: int) -> Tensor:
        n = torch.bincount(labels, minlength=K).double()
        removed = torch.bincount(labels[~keep], minlength=K).double()
        return torch.logit(removed.clamp(min=torch.tensor(0.25), max=n - 0.25) / n)

    ffn = [thresholds(m, y, k) for m, y, k in zip(masks.ffn, ranks.labels, ranks.modules, strict=True)]
    attention = [thresholds(m, torch.zeros(len(m), dtype=torch.long), 1) for m in masks.attention]
    return ffn, attention


def masks_from_thresholds(
    ranks: ModuleRanks,
    thresholds: tuple[list[Tensor], list[Tensor]],
    costs: UnitCosts,
    *,
    target: int,
    width_multiple: int = 1,
) -> Masks:
    """Keep masks that meet the budget, from thresholds per module."""
    ffn, attention = thresholds
    neuron = [margins(p, t.detach().cpu(), y) for p, t, y in zip(ranks.ffn, ffn, ranks.labels, strict=True)]
    group = [torch.logit(p) - t.detach().cpu().double() for p, t in zip(ranks.attention, attention, strict=True)]
    return keep_masks(costs, neuron, group, target=target, width_multiple=width_multiple)
