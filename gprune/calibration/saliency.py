"""Taylor saliency: how much the loss depends on the weights of every channel, computed from gradients.

For each linear layer, a backward pass over the frozen model gives the input x (B, T, in) and the gradient of the output
d (B, T, out). The weight's gradient for window b is d_b^T x_b. A hook computes and sums it window by window, so weights
stay frozen and no gradients are stored.

Memory: for each half of the corpus, a float32 sum of gradients with the size of the weights. This is 0.64 GB for the
FFNs of a model with 135M parameters, and about 35 GB for 7B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from gprune.calibration.moments import add_large_state
from gprune.errors import UserError, require_finite
from gprune.models.blocks import PARTS, Block, Part


def salient_parts(block: Block, scope: str) -> dict[str, Part]:
    """Return the parts of a block whose weights count for its neurons (`ffn`) or attention channels, by name.

    UserError for experts.
    """
    if scope == "ffn" and block.has_experts:
        remedy = "Use an --importance that needs no gradients, such as wanda_sp"
        raise UserError(f"Taylor saliency cannot be collected for experts ({block.family.model_type}). {remedy}.")
    return {name: block.parts[name] for name in PARTS[scope] if name in block.parts}


class StreamingGradients(Metric):
    """Metric of one linear layer: sum of its weight's gradient over windows, by half of the corpus."""

    full_state_update = False

    def __init__(self, shape: tuple[int, int]):
        super().__init__(compute_with_cache=False)  # the cache would be a second copy of the sums
        self.add_state("count", torch.zeros(2), dist_reduce_fx="sum")
        add_large_state(self, "gradient", 2, *shape)

    def update(self, x: Tensor, gradient: Tensor, halves: Sequence[int | None]) -> None:
        """Add inputs (B, T, in) and gradients (B, T, out) of windows to their halves; None ignores a window."""
        for window, half in enumerate(halves):
            if half is not None:
                self.gradient[half] += gradient[window].float().T @ x[window].float()
                self.count[half] += 1

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return numbers of windows, (2,), and sums, (2, out, in), by half of the corpus."""
        return self.count, self.gradient


def weight_saliency(weight: Tensor, count: Tensor, gradient: Tensor, *, columns: bool) -> tuple[Tensor, ...]:
    """Return the Taylor saliency of a weight's rows (out,) or columns (in,), float64 on the CPU.

    It is that of half 0, half 1 and the whole corpus, from the results of `StreamingGradients.compute`.
    """
    weight = weight.detach().float().cpu()
    count = count.cpu()
    gradient = gradient.cpu()
    require_finite("gradient came up during calibration", gradient)
    summed_dim = 0 if columns else 1

    def saliency(*halves: int) -> Tensor:
        """Return saliency from the mean gradient over the windows of these halves."""
        mean = sum(gradient[h] for h in halves) / sum(count[h] for h in halves).clamp_min(1)  # 0 without windows
        return (weight * mean).abs().sum(summed_dim, dtype=torch.float64)

    return saliency(0), saliency(1), saliency(0, 1)


def channel_saliency(block: Block, scope: str, metrics: Mapping[str, StreamingGradients]) -> tuple[Tensor, ...]:
    """Return the saliency of a block's channels, summed over the block's parts: as `ChannelStatistics.saliency`."""
    parts = salient_parts(block, scope)
    if not parts:
        return (torch.zeros(0, dtype=torch.float64),) * 3
    by_part = []
    for name, part in parts.items():
        count, gradient = metrics[name].compute()
        saliency = weight_saliency(part.weight, count, gradient, columns=name in ("down", "output"))
        if name in ("query", "key", "value"):
            saliency = tuple(_by_channel(block, name, rows) for rows in saliency)
        by_part.append(saliency)
    return tuple(sum(terms[1:], start=terms[0]) for terms in zip(*by_part, strict=True))


def _by_channel(block: Block, name: str, rows: Tensor) -> Tensor:
    """Convert saliency of rows of query, key or value to saliency of attention channels, (heads x head_dim,).

    Rows belong to a query head or, for key and value, to a KV group. If the rows per head or group are a multiple of
    head_dim, such as those of a query and its gate, the rows of each channel are added. If not, as in latent attention,
    the sum of the rows is divided equally among the head_dim channels. Saliency of the key and value of a KV group is
    divided equally among its query heads.
    """
    per_head = rows.view(block.heads if name == "query" else block.kv_groups, -1)
    if per_head.shape[1] % block.head_dim == 0:
        per_head = per_head.unflatten(1, (-1, block.head_dim)).sum(1)
    else:
        per_head = (per_head.sum(1, keepdim=True) / block.head_dim).expand(-1, block.head_dim)
    channels = per_head.flatten()
    if name == "query":
        return channels
    return block.per_query_head(channels) / (block.heads // block.kv_groups)
