"""Recovery `bias`: add the mean contribution of the removed units, as FLAP does (arXiv 2312.11983, eq. 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gprune.recoveries.contract import recovery

if TYPE_CHECKING:
    from torch import Tensor

    from gprune.calibration.statistics import Moments


@recovery("bias", experts=False)
def bias(weight: Tensor, keep: Tensor, moments: Moments, ridge: float) -> tuple[Tensor, Tensor | None]:
    """W' = W_K, b = W_R mean(x_R): removed channels R are replaced by their mean over tokens."""
    mean = moments.mean.to(weight)
    return weight[:, keep], weight[:, ~keep] @ mean[~keep]
