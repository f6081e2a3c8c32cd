"""Recovery `least_squares`: solve every output projection on the kept units, with Gram matrices of the dense model.

`contract.Projection` calls the function for each output projection that lost channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gprune.recoveries.contract import recovery

if TYPE_CHECKING:
    from torch import Tensor

    from gprune.calibration.statistics import Moments


@recovery("least_squares", needs=("moments", "gram"))
def least_squares(weight: Tensor, keep: Tensor, moments: Moments, ridge: float) -> tuple[Tensor, Tensor | None]:
    """W' = argmin_V sum ||W x - V x_K||^2 + lambda ||V - W_K||^2 = W_K + W_R G_RK (G_KK + lambda I)^-1.

    Sums are over tokens. G = sum x x^T on dense activations, lambda = ridge * mean diagonal of G_KK. For large lambda
    W' approaches W_K, which is `none`, and not zero. Solved in float64 by Cholesky, on the device of the weight.
    """
    gram = moments.gram  # read once: it may be stored in a file
    assert gram is not None, "least_squares needs Gram matrices"
    gram = gram.to(weight.device)
    kept = keep.nonzero()[:, 0].to(weight.device)
    removed = (~keep).nonzero()[:, 0].to(weight.device)
    # Convert only the needed parts to float64: the whole matrix has half a gigabyte at 7B in float32.
    G_kk = gram[kept][:, kept].double()
    G_rk = gram[removed][:, kept].double()
    del gram
    correction = ridge_correction(G_kk, weight[:, removed].double() @ G_rk, ridge)
    return (weight[:, kept].double() + correction).to(weight.dtype), None


def ridge_correction(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return D = C (G + lambda I)^-1, (H, K) float64, which minimises sum ||(W + D) x - y||^2 + lambda ||D||^2.

    G = sum x x^T is `gram`, (K, K) float64, whose diagonal is changed in place. C = sum (y - W x) x^T is `cross`, (H,
    K). Lambda is `ridge` times the mean diagonal of G.
    """
    import torch

    # Due to rounding, a float32 Gram matrix of few tokens is not quite positive semidefinite. The rounding error is
    # proportional to the largest eigenvalue, which is at most the trace (K times the mean diagonal); lambda exceeds it.
    floor = torch.finfo(torch.float32).eps * len(gram)
    damping = max(max(ridge, floor) * float(gram.diagonal().mean()), 1e-12)
    gram.diagonal().add_(damping)
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T
