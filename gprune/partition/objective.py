"""Objective of the refinement, differentiable in soft assignments of neurons to modules.

`stages/refinement.py` minimises it. The formulas are our reading of GPrune-LLM (arXiv 2603.13418).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from gprune.partition.initial import unit_variance


@dataclass(frozen=True)
class RefinementInputs:
    """Inputs of the objective for B blocks, padded to N neurons; float32."""

    embedding: Tensor  # (B, N, E) parameter similarity, total variance 1
    drift: Tensor  # (B, N, 1) standardised rank drift
    shifts: Tensor  # (B, N, D) standardised rank shifts: a neuron's rank on each corpus minus its mean rank
    valid: Tensor  # (B, N) 1 for a neuron, 0 for padding

    def to(self, device: torch.device | str) -> RefinementInputs:
        """Copy to a device."""
        return RefinementInputs(**{name: value.to(device) for name, value in vars(self).items()})


def dispersion(P: Tensor, x: Tensor) -> Tensor:
    """Return the within-module share of the total variance of x (B, N, d) for assignments P (B, N, K): (B,) in [0, 1].

    sum_ik P_ik ||x_i - c_k||^2 / sum_i ||x_i - c||^2 with c_k the P-weighted mean. Since sum_k P_ik = 1, the numerator
    is sum_i ||x_i||^2 - sum_k n_k ||c_k||^2, which does not need a (N, K, d) tensor. 0/0 (x is constant) counts as 0.
    Features are centred, and 0 for padding.
    """
    n = reduce(P, "b n k -> b k", "sum").clamp_min(1e-6)
    c = torch.einsum("bnk,bnd->bkd", P, x) / rearrange(n, "b k -> b k 1")
    total = reduce(x.square(), "b n d -> b", "sum")
    inside = total - torch.einsum("bk,bkd->b", n, c.square())
    return inside / total.clamp_min(1e-12)


def entropy(p: Tensor) -> Tensor:
    """Return the elementwise entropy -p log p, with a finite gradient at 0. That of torch.special.entr is infinite."""
    return -p * p.clamp_min(1e-9).log()


def partition_objective(
    logits: Tensor, tau: float, inputs: RefinementInputs, weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the terms of the refinement objective by name, (B,) each, and their weighted sum as `total`.

    With P = softmax(A / tau) over K modules, `logits` A (B, N, K):

        L = w_s S(P) + w_d V(P) - w_c C(P) + w_b B(P) + w_e H(P)

    S in [0, 1]: within-module share of the parameter embedding's variance (`dispersion`).
    V in [0, 1]: the same for rank drift.
    C <= 1: rank consistency. delta_i^(d) = r_i^(d) - mean_d r_i^(d); neurons whose ranks move together between
        corpora keep their order. C = 1 - dispersion(P, delta) - (n_eff - 1)/(N - 1): the share of the shifts that
        modules explain, minus about the share (K - 1)/(N - 1) that a random partition explains. n_eff = exp(entropy of
        the module sizes) is a smooth count of modules, equal to K for equal sizes. The mean rank is subtracted in
        delta, so mixing weak and strong neurons is not rewarded. C = 0 if no rank shifts.
    B in [0, 1]: 1 - entropy of the module sizes / log K; 0 if all sizes are equal.
    H in [0, 1]: mean entropy of P_i / log K; 0 if every neuron belongs entirely to a single module.
    For all blocks, K in B and H is the number of modules of the block with most modules. So B of a block with fewer
    modules stays above 0.
    """
    K = logits.shape[-1]
    P = (logits / tau).softmax(-1) * rearrange(inputs.valid, "b n -> b n 1")
    N = inputs.valid.sum(1)
    log_k = torch.tensor(float(max(K, 2))).log()
    size_shares = reduce(P, "b n k -> b k", "sum") / rearrange(N, "b -> b 1")
    size_entropy = entropy(size_shares).sum(-1)
    any_shift = inputs.shifts.square().sum((1, 2)) > 0  # with a single corpus no rank shifts
    explained_share = 1 - dispersion(P, inputs.shifts)
    random_share = (size_entropy.exp() - 1) / (N - 1).clamp_min(1)  # a random partition would explain it
    terms = {
        "similarity": dispersion(P, inputs.embedding),
        "drift": dispersion(P, inputs.drift),
        "consistency": any_shift * (explained_share - random_share),
        "balance": 1 - size_entropy / log_k,
        "entropy": entropy(P).sum((1, 2)) / (N * log_k),
    }
    signs = {"consistency": -1.0}  # consistency is maximised; all other terms are minimised
    terms["total"] = sum(weights[name] * signs.get(name, 1.0) * value for name, value in terms.items())
    return terms


def refinement_inputs(embeddings: list[Tensor], drifts: list[Tensor], ranks: list[Tensor]) -> RefinementInputs:
    """Stack and pad embeddings (N, E), drifts (N,) and ranks (D, N) of blocks, which may have different widths."""
    width = max(len(drift) for drift in drifts)

    def pad_and_stack(features: list[Tensor]) -> Tensor:
        """Return (B, width, d) float32 from (N, d) for each block."""
        return torch.stack([F.pad(x.float(), (0, 0, 0, width - len(x))) for x in features])

    return RefinementInputs(
        embedding=pad_and_stack([unit_variance(embedding) for embedding in embeddings]),
        drift=pad_and_stack([unit_variance(drift[:, None]) for drift in drifts]),
        shifts=pad_and_stack([unit_variance((of_block - of_block.mean(0)).T.contiguous()) for of_block in ranks]),
        valid=pad_and_stack([torch.ones(len(drift), 1) for drift in drifts])[..., 0],
    )
