"""Taylor saliency: how much the loss depends on the weights of every channel, by their gradients.

A backward pass over the frozen model gives, at each linear layer, its input x (B, T, in) and the gradient of its output
d (B, T, out); the weight's gradient for window b is d_b^T x_b. A hook computes it at once, window by window, without
autograd, so no weight is unfrozen and no gradient outlives the sums below.

Memory: for each half of the corpus, a sum of gradients and a sum of squares, each as large as the weights, in float32:
1.3 GB for the FFN of a model of 135M parameters, some 70 GB for one of 7B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from gprune.calibration.moments import add_large_state
from gprune.calibration.statistics import Saliency
from gprune.errors import UserError, require_finite
from gprune.models.blocks import PARTS, Block, Part


def salient_parts(block: Block, kind: str) -> dict[str, Part]:
    """The parts of a block whose weights enter the terms of its neurons or attention channels, by name."""
    if kind == "ffn" and block.has_experts:
        expected = "expected dense blocks, or an --importance that needs no gradients, such as wanda_sp"
        raise UserError(f"Taylor saliency cannot be collected for experts ({block.family.model_type}); {expected}.")
    return {name: block.parts[name] for name in PARTS[kind] if name in block.parts}


class StreamingGradients(Metric):
    """torchmetrics state of one linear layer: sums over windows of its weight's gradient and of the squares."""

    full_state_update = False

    def __init__(self, shape: tuple[int, int]):
        super().__init__(compute_with_cache=False)  # the cache is a second copy, as large as the sums
        self.add_state("count", torch.zeros(2), dist_reduce_fx="sum")
        for name in ("gradient", "square"):
            add_large_state(self, name, 2, *shape)

    def update(self, x: Tensor, gradient: Tensor, halves: Sequence[int | None]) -> None:
        """Add windows with inputs x (B, T, in) and gradients (B, T, out) of each window's own loss by the outputs;
        `halves`: of each window, 0 or 1; None leaves it out."""
        for b, h in enumerate(halves):
            if h is not None:
                g = gradient[b].float().T @ x[b].float()
                self.gradient[h] += g
                self.square[h].addcmul_(g, g)
                self.count[h] += 1

    def compute(self) -> dict[str, Tensor]:
        """`count` (2,) windows, `gradient` and `square` (2, out, in)."""
        return {"count": self.count, "gradient": self.gradient, "square": self.square}


def window_saliency(weight: Tensor, sums: dict[str, Tensor], *, columns: bool) -> tuple[Saliency, Saliency, Saliency]:
    """Terms of one weight (out, in), per row or per column, for the halves of a corpus and for the whole."""
    w, dim = weight.detach().float().cpu(), 0 if columns else 1
    count, gradient, square = (sums[name].cpu() for name in ("count", "gradient", "square"))
    require_finite("gradient came up during calibration", square)

    def terms(*halves: int) -> Saliency:
        """What the gradients of these halves of the corpus say of one weight matrix."""
        n = sum(count[h] for h in halves).clamp_min(1)
        first = w * (sum(gradient[h] for h in halves) / n)
        second = w.square() * (sum(square[h] for h in halves) / n) / 2
        return Saliency(
            first.abs().sum(dim, dtype=torch.float64),
            (first - second).abs().sum(dim, dtype=torch.float64),
            first.sum(dim, dtype=torch.float64).abs(),
        )

    return terms(0), terms(1), terms(0, 1)


def channel_saliency(block: Block, kind: str, sums: Callable[[str], dict[str, Tensor]]) -> tuple[Saliency, ...]:
    """Terms of a block's neurons (`ffn`) or attention channels, for half 0, half 1 and the whole corpus; `sums` gives
    the result of `StreamingGradients.compute` for one part of the block at a time."""
    heads = block.channels_per_group // block.head_dim
    by_part = []
    for name, part in salient_parts(block, kind).items():
        terms = window_saliency(part.weight, sums(name), columns=name in ("down", "output"))
        if name in ("key", "value"):  # the query heads of a group share its rows
            terms = tuple(Saliency(*(block.per_query_head(v) / heads for v in vars(t).values())) for t in terms)
        by_part.append(terms)
    return tuple(sum(parts[1:], start=parts[0]) for parts in zip(*by_part, strict=True))
