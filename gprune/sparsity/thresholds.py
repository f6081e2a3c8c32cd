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
from gprune.units.structure import current_name, unit_key

Thresholds = Mapping[str, Tensor]  # by key of units, in logits: (K,) for K modules; units that are one module have (1,)


def start_thresholds(masks: Masks, ranks: ModuleRanks) -> dict[str, Tensor]:
    """Return thresholds, float64, at which each module keeps as many units as in the masks.

    t_m = logit(removed fraction); the fraction is kept a quarter of a rank away from 0 and 1, where the logit is
    infinite. If all modules rank by the base metric, these thresholds reproduce the base masks exactly.
    """

    def thresholds(keep: Tensor, labels: Tensor, K: int) -> Tensor:
        """Return the thresholds of K modules, (K,), from a keep mask and the module of each unit."""
        sizes = torch.bincount(labels, minlength=K).double().clamp_min(1)  # 1 avoids 0 / 0 without units
        removed = torch.bincount(labels[~keep], minlength=K).double()
        return torch.logit(removed.clamp(min=torch.tensor(0.25), max=sizes - 0.25) / sizes)

    return {key: thresholds(masks[key], labels, ranks.modules[key]) for key, labels in ranks.labels.items()}


def unit_margins(ranks: ModuleRanks, thresholds: Thresholds) -> dict[str, Tensor]:
    """Return margins logit p_i - t_m by key, (N,) float64."""
    logits, labels = ranks.logits, ranks.labels
    return {key: logits[key] - t.detach()[labels[key]].double() for key, t in thresholds.items()}


def masks_from_thresholds(ranks: ModuleRanks, thresholds: Thresholds, budget: Budget) -> Masks:
    """Return keep masks that meet the budget, from thresholds per module."""
    return keep_masks(budget, unit_margins(ranks, thresholds))


@dataclass(frozen=True)
class ModuleSparsity:
    """What step 7 decides, as it is stored in `thresholds.safetensors`: thresholds, offsets, or the learner's masks."""

    thresholds: Thresholds | None  # None if the learner has no thresholds
    offsets: Mapping[str, Tensor] | None = None  # shift of each neuron's rank in logits, (N,) by key
    fixed_masks: Masks | None = None  # masks for one budget, if they do not follow from thresholds and offsets

    def masks(self, ranks: ModuleRanks, budget: Budget) -> Masks:
        """Return keep masks that meet the budget."""
        if self.fixed_masks is not None:
            return self.fixed_masks
        shifted_ranks = ranks if self.offsets is None else ranks.with_offsets(self.offsets)
        return masks_from_thresholds(shifted_ranks, self.thresholds, budget)

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors by the names `neurons.0`, `kv_groups.0`, `offsets.neurons.0`, `masks.neurons.0` and so on."""
        named = {key: t.detach().cpu() for key, t in (self.thresholds or {}).items()}
        named |= {f"offsets.{key}": of_units.detach().cpu() for key, of_units in (self.offsets or {}).items()}
        return named | {f"masks.{key}": mask for key, mask in (self.fixed_masks or {}).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ModuleSparsity:
        """Return the sparsity of modules from the result of `tensors`, also from a file of an earlier version."""
        parts: dict[str, dict[str, Tensor]] = {"": {}, "offsets": {}, "masks": {}}
        for name, tensor in tensors.items():
            part = next((part for part in ("offsets", "masks") if name.startswith(f"{part}.")), "")
            key = current_name(name.removeprefix(f"{part}."))
            parts[part][unit_key("neurons", int(key)) if key.isdigit() else key] = tensor
        masks = Masks.from_tensors(parts["masks"]) if parts["masks"] else None
        return cls(parts[""] or None, parts["offsets"] or None, masks)
