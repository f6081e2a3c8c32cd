"""Taylor saliency: how much the loss depends on the weights of every channel, computed from gradients.

For each linear layer, a backward pass over the frozen model gives the input x (B, T, in) and the gradient of the output
d (B, T, out). The weight's gradient for window b is d_b^T x_b. A hook computes and sums it window by window, so weights
stay frozen and no gradients are stored.

Memory: for each half of the corpus, a float32 sum of gradients with the size of the weights. This is 0.64 GB for the
FFNs of a model with 135M parameters, and about 35 GB for 7B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor, nn
from torchmetrics import Metric

from gprune.calibration.moments import add_large_state
from gprune.errors import UserError, require_finite
from gprune.models.experts import is_of_experts
from gprune.models.modeling_pruned import find_parent
from gprune.models.offload import load_parameter
from gprune.models.paths import attribute_at
from gprune.units.structure import Units


@dataclass(frozen=True)
class SalientPart:
    """A weight matrix (out, in), alone or fused, that counts for units."""

    name: str  # `query`, `key`, `value` or `row`; `output` for the one that reads the units
    path: str  # of the stored weight in the layer
    dim: int  # of outputs in the stored weight
    rows: Tensor  # (out,) int64: those of this part

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """Return the shape of the weight, (out, in), without loading it."""
        return len(self.rows), attribute_at(layer, self.path).shape[1 - self.dim]

    def weight(self, layer: nn.Module) -> Tensor:
        """Return the weight (out, in)."""
        weight = load_parameter(*find_parent(layer, self.path))
        weight = weight.T if self.dim else weight
        return weight if len(self.rows) == len(weight) else weight[self.rows.to(weight.device)]


def salient_parts(u: Units, layer: nn.Module) -> list[SalientPart]:
    """Return the weights that count for neurons or attention channels. Raise UserError for experts."""
    if is_of_experts(layer, u):
        remedy = "Use an --importance that needs no gradients, such as wanda_sp"
        raise UserError(f"Taylor saliency cannot be collected for experts ('{u.reads}'). {remedy}.")
    found: list[SalientPart] = []
    for s in u.slices[:-1]:
        if attribute_at(layer, s.path).dim() == 2:
            named = [part for part in s.parts if u.kind == "neurons" or part[0] in ("query", "key", "value")]
            found += [SalientPart(name, s.path, s.dim, rows) for name, rows in named]
    if u.reads:
        s = u.slices[-1]
        outputs = attribute_at(layer, s.path).shape[1 - s.dim]
        found.append(SalientPart("output", s.path, 1 - s.dim, torch.arange(outputs)))
    return found


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


def channel_saliency(u: Units, layer: nn.Module, metrics: Sequence[StreamingGradients]) -> tuple[Tensor, ...]:
    """Return the saliency of channels, summed over `salient_parts`: as `ChannelStatistics.saliency`.

    `metrics` has one metric for each part.
    """
    if not metrics:
        return (torch.zeros(0, dtype=torch.float64),) * 3
    by_part, parts = [], salient_parts(u, layer)
    values = next((len(part.rows) for part in parts if part.name == "value"), 0)  # rows of all value heads
    for part, metric in zip(parts, metrics, strict=True):
        count, gradient = metric.compute()
        saliency = weight_saliency(part.weight(layer), count, gradient, columns=part.name == "output")
        if part.name in ("query", "key", "value"):
            is_query = part.name == "query"
            saliency = tuple(_by_channel(u, rows, values // u.count, is_query=is_query) for rows in saliency)
        by_part.append(saliency)
    return tuple(sum(terms[1:], start=terms[0]) for terms in zip(*by_part, strict=True))


def _by_channel(u: Units, rows: Tensor, head_dim: int, *, is_query: bool) -> Tensor:
    """Convert saliency of rows of query, key or value to saliency of attention channels, (heads x head_dim,).

    Rows belong to a query head or, for key and value, to a KV group. If the rows per head or group are a multiple of
    head_dim, such as those of a query and its gate, the rows of each channel are added. If not, as in latent attention,
    the sum of the rows is divided equally among the head_dim channels. Saliency of the key and value of a KV group is
    divided equally among its query heads.
    """
    heads_per_group = len(u.slices[-1].unit) // u.count // head_dim
    per_head = rows.view(u.count * heads_per_group if is_query else u.count, -1)
    if per_head.shape[1] % head_dim == 0:
        per_head = per_head.unflatten(1, (-1, head_dim)).sum(1)
    else:
        per_head = (per_head.sum(1, keepdim=True) / head_dim).expand(-1, head_dim)
    if is_query:
        return per_head.flatten()
    return repeat(per_head, "g d -> (g q d)", q=heads_per_group) / heads_per_group
