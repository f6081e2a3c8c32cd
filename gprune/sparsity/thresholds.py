"""Sparsity of modules: initial thresholds, what is learned, and conversion to masks under a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    return keep_masks(budget, *unit_margins(ranks, thresholds))


@dataclass(frozen=True)
class ModuleSparsity:
    """What step 7 decides, as it is stored in `thresholds.safetensors`: thresholds, offsets, or the learner's masks."""

    thresholds: Thresholds | None  # None if the learner has no thresholds
    offsets: list[Tensor] | None = None  # shift of each neuron's rank in logits, per block (N,)
    fixed_masks: Masks | None = None  # masks for one budget, if they do not follow from thresholds and offsets

    def masks(self, ranks: ModuleRanks, budget: Budget) -> Masks:
        """Return keep masks that meet the budget."""
        if self.fixed_masks is not None:
            return self.fixed_masks
        shifted_ranks = ranks if self.offsets is None else ranks.with_offsets(self.offsets)
        return masks_from_thresholds(shifted_ranks, self.thresholds, budget)

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors by the names `ffn.0`, `attention.0`, `offsets.0`, `masks.ffn.0` and so on."""
        named = {}
        for kind, by_block in zip(("ffn", "attention"), self.thresholds or ((), ()), strict=True):
            named |= {f"{kind}.{b}": t.detach().cpu() for b, t in enumerate(by_block)}
        named |= {f"offsets.{b}": of_block.detach().cpu() for b, of_block in enumerate(self.offsets or ())}
        if self.fixed_masks is not None:
            named |= {f"masks.{name}": mask for name, mask in self.fixed_masks.tensors().items()}
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ModuleSparsity:
        """Return the sparsity of modules from the result of `tensors`."""

        def by_block(kind: str) -> list[Tensor]:
            return [tensors[f"{kind}.{b}"] for b in range(sum(name.startswith(f"{kind}.") for name in tensors))]

        thresholds = by_block("ffn"), by_block("attention")
        masks = {name.removeprefix("masks."): t for name, t in tensors.items() if name.startswith("masks.")}
        return cls(
            thresholds=thresholds if thresholds[0] else None,
            offsets=by_block("offsets") or None,
            fixed_masks=Masks.from_tensors(masks) if masks else None,
        )
