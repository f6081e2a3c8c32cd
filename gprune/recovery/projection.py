"""Recovery without training: what the removed units contributed, given back by the units that stay.

`none` is the paper's method; the others go beyond it and are named in every table. Each is a function of one projection
and of the dense model's activations: `bias` of their means (FLAP, arXiv 2312.11983, eq. 8), `least_squares` of their
Gram matrices. But `least_squares_sequential` takes the pruned model's own, block after block: `gprune.recovery.sequential`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gprune.calibration.statistics import Moments
from gprune.errors import UserError
from gprune.registry import Registry

Recovery = Callable[[Tensor, Tensor, Moments, float], tuple[Tensor, Tensor | None]]
RECOVERY: Registry[Recovery] = Registry("recovery")


@RECOVERY.register("none")
def none(weight: Tensor, keep: Tensor, moments: Moments, ridge: float) -> tuple[Tensor, Tensor | None]:
    """W' = W_K: the kept columns as they are."""
    return weight[:, keep], None


@RECOVERY.register("bias")
def bias(weight: Tensor, keep: Tensor, moments: Moments, ridge: float) -> tuple[Tensor, Tensor | None]:
    """W' = W_K, b = W_R mean(x_R): removed channels R give their mean over tokens (FLAP's compensation)."""
    mean = moments.mean.to(weight)
    return weight[:, keep], weight[:, ~keep] @ mean[~keep]


@RECOVERY.register("least_squares")
def least_squares(weight: Tensor, keep: Tensor, moments: Moments, ridge: float) -> tuple[Tensor, Tensor | None]:
    """W' = argmin_V E ||W x - V x_K||^2 + lambda ||V - W_K||^2 = W_K + W_R G_RK (G_KK + lambda I)^-1.

    G = sum over tokens of x x^T on dense activations, lambda = ridge * mean diagonal of G_KK. Written as a correction
    of W_K, a large lambda leads back to `none` and not to zero. Solved in float64 by Cholesky.
    """
    gram = moments.gram  # looked at once: it may lie in a file
    assert gram is not None, "least_squares needs Gram matrices"
    # The parts that are needed before float64: all of it would be twice the matrix, which is half a gigabyte at 7B.
    G_kk, G_rk = gram[keep][:, keep].double(), gram[~keep][:, keep].double()
    del gram
    correction = ridge_correction(G_kk, weight[:, ~keep].double() @ G_rk, ridge)
    return (weight[:, keep].double() + correction).to(weight.dtype), None


@RECOVERY.register("least_squares_sequential")
def least_squares_sequential(
    weight: Tensor, keep: Tensor, moments: Moments, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """W' = `least_squares` on what the pruned model itself computes: not a function of one projection's moments.

    Raises:
        UserError: always; it has its name here, and `gprune.recovery.sequential.recover_sequentially` goes through both models.
    """
    raise UserError(
        "Recovery 'least_squares_sequential' needs the models and their text, not one projection's moments; call "
        "gprune.recovery.sequential.recover_sequentially."
    )


def ridge_correction(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """D = E (G + lambda I)^-1: what to add to W so that sum ||(W + D) x - y||^2 + lambda ||D||^2 is least.

    Args:
        gram: G = sum x x^T, (K, K) float64; its diagonal is changed.
        cross: E = sum (y - W x) x^T, (H, K) float64.
        ridge: lambda over the mean diagonal of G.

    Returns:
        (H, K) float64, by Cholesky.
    """
    # A float32 Gram of few tokens is not quite positive semidefinite: never below its own rounding.
    damping = max(max(ridge, 1e-6) * float(gram.diagonal().mean()), 1e-12)
    gram.diagonal().add_(damping)
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T


def least_squares_correction(weight: Tensor, keep: Tensor, moments: Moments, *, ridge: float = 0.01) -> Tensor:
    """What `least_squares` adds to the kept columns of a projection, (H, C) in the weight's dtype; removed ones: 0.

    Arguments as for `recover_projection`, of a projection without experts.
    """
    new, _ = least_squares(weight.float(), keep, moments, ridge)
    correction = torch.zeros_like(weight)
    correction[:, keep] = (new - weight[:, keep].float()).to(weight.dtype)
    return correction


NEEDS_GRAM = frozenset({"least_squares"})
ADDS_BIAS = frozenset({"bias"})
SEQUENTIAL = frozenset(
    {"least_squares_sequential"}
)  # of whole models, by `gprune.recovery.sequential`; the others by projection


def recover_projection(
    weight: Tensor, keep: Tensor, moments: Moments, *, experts: int = 1, method: str = "none", ridge: float = 0.01
) -> tuple[Tensor, Tensor | None]:
    """New weight and added bias of an output projection whose channels are cut down to `keep`.

    Args:
        weight: (H, C) dense projection, any float dtype; computed in float32 or better, returned in its dtype.
        keep: (C,) bool, True = keep.
        moments: of the dense input channels over `corpora.recover`.
        experts: E whose columns lie side by side; each is recovered by itself.
        method: name in `RECOVERY`, but for those in `SEQUENTIAL`.
        ridge: lambda of `least_squares`, relative to the mean diagonal.

    Returns:
        (H, kept) weight and (H,) bias to add, or None.
    """
    function, dtype = RECOVERY[method], weight.dtype
    if moments.count.dim():  # of each expert by itself
        parts = zip(weight.float().chunk(experts, 1), keep.chunk(experts), range(experts), strict=True)
        news = [function(w, k, moments.of_expert(e, experts), ridge)[0] for w, k, e in parts]
        return torch.cat(news, 1).to(dtype), None
    new, added = function(weight.float(), keep, moments, ridge)
    return new.to(dtype), None if added is None else added.to(dtype)
