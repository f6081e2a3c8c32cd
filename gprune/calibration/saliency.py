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


def salient_parts(block: Block, kind: str) -> dict[str, Part]:
    """Return the parts of a block whose weights count for its neurons or attention channels, by name."""
    if kind == "ffn" and block.has_experts:
        remedy = "Use an --importance that needs no gradients, such as wanda_sp"
        raise UserError(f"Taylor saliency cannot be collected for experts ({block.family.model_type}). {remedy}.")
    return {name: block.parts[name] for name in PARTS[kind] if name in block.parts}


class StreamingGradients(Metric):
    """torchmetrics state of one linear layer: sum of its weight's gradient over windows."""

    full_state_update = False

    def __init__(self, shape: tuple[int, int]):
        super().__init__(compute_with_cache=False)  # the cache would be a second copy of the sums
        self.add_state("count", torch.zeros(2), dist_reduce_fx="sum")
        add_large_state(self, "gradient", 2, *shape)

    def update(self, x: Tensor, gradient: Tensor, halves: Sequence[int | None]) -> None:
        """Add windows.

        Args:
            x: inputs, (B, T, in).
            gradient: gradient of each window's loss by the outputs, (B, T, out).
            halves: half of each window, 0 or 1; windows with None are ignored.
        """
        for b, h in enumerate(halves):
            if h is not None:
                self.gradient[h] += gradient[b].float().T @ x[b].float()
                self.count[h] += 1

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return numbers of windows, (2,), and sums, (2, out, in), by half of the corpus."""
        return self.count, self.gradient


def weight_saliency(weight: Tensor, count: Tensor, gradient: Tensor, *, columns: bool) -> tuple[Tensor, ...]:
    """Return saliency per row or column of one weight (out, in): for both halves of a corpus, and for the whole.

    Args:
        weight: the weight.
        count: numbers of windows, from `StreamingGradients.compute`.
        gradient: sums of gradients, from `StreamingGradients.compute`.
        columns: whether to sum over rows, for saliency of columns.
    """
    w, dim = weight.detach().float().cpu(), 0 if columns else 1
    count, gradient = count.cpu(), gradient.cpu()
    require_finite("gradient came up during calibration", gradient)

    def terms(*halves: int) -> Tensor:
        """Return saliency from the gradients of these halves."""
        mean = sum(gradient[h] for h in halves) / sum(count[h] for h in halves).clamp_min(1)
        return (w * mean).abs().sum(dim, dtype=torch.float64)

    return terms(0), terms(1), terms(0, 1)


def channel_saliency(block: Block, kind: str, metrics: Mapping[str, StreamingGradients]) -> tuple[Tensor, ...]:
    """Return saliency of a block's neurons (`ffn`) or attention channels, for half 0, half 1 and the whole corpus."""
    if not salient_parts(block, kind):
        return (torch.zeros(0, dtype=torch.float64),) * 3
    by_part = []
    for name, part in salient_parts(block, kind).items():
        terms = weight_saliency(part.weight, *metrics[name].compute(), columns=name in ("down", "output"))
        if name in ("query", "key", "value"):
            terms = tuple(_by_channel(block, name, term) for term in terms)
        by_part.append(terms)
    return tuple(sum(parts[1:], start=parts[0]) for parts in zip(*by_part, strict=True))


def _by_channel(block: Block, name: str, rows: Tensor) -> Tensor:
    """Convert saliency of rows of query, key or value to saliency of attention channels, (heads x head_dim,).

    If a head has several rows per channel, such as a query and its gate, they are added. If the number of rows is not a
    multiple of channels, as in latent attention, their sum is divided equally among channels. Terms of key and value
    are divided equally among the query heads of a group.
    """
    per_head = rows.view(block.heads if name == "query" else block.kv_groups, -1)
    if per_head.shape[1] % block.head_dim == 0:
        per_head = per_head.unflatten(1, (-1, block.head_dim)).sum(1)
    else:
        per_head = (per_head.sum(1, keepdim=True) / block.head_dim).expand(-1, block.head_dim)
    channels = per_head.flatten()
    return channels if name == "query" else block.per_query_head(channels) / (block.heads // block.kv_groups)
