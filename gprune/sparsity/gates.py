"""Soft gates for learning thresholds. `gprune.models.gating` applies gates and masks to a model."""

from __future__ import annotations

import torch
from torch import Tensor

from gprune.models.gating import bypassed, gated, masked

__all__ = ["bypassed", "gated", "masked", "soft_gate", "straight_through"]


def soft_gate(p: Tensor, thresholds: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
    """Return the differentiable mask sigmoid((p_i - sigmoid(t_m)) / T_m), (N,), with T_m = max(0.05, 1 / n_m).

    p are within-module ranks (N,) in (0, 1), and labels (N,) are modules in [0, K). Thresholds t (K,) are logits:
    sigmoid(t_m) is the share of the module that is removed. Sizes n are (K,) units per module.
    """
    temperature = (1 / sizes.to(p.dtype)).clamp_min(0.05)
    return torch.sigmoid((p - torch.sigmoid(thresholds)[labels]) / temperature[labels])


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the value of `hard` with the gradient of `soft` (Bengio et al., arXiv 1308.3432)."""
    return (soft - soft.detach()) + hard.to(soft.dtype)  # in this order the value is exactly 0 or 1
