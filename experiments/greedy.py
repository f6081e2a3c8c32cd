"""Greedy removal with compensation, as an allocation: is it better than scores of neurons, behind least squares?

    python train.py --config protocol --config untrained --model.name smollm2-135m --import experiments/greedy.py \\
        --sparsity.allocation greedy --evaluation.controls [averaged] --recovery least_squares

In each block, one neuron after the other goes: the one whose loss raises the error of the output projection least, once
the neurons that stay have made up for it. OSSCAR (arXiv 2403.12983), ZipLM (2302.04089) and SlimGPT (2412.18110) remove
by this objective. Blocks lose the same fraction each. The rows `base` and `averaged` have these masks, from the Gram
matrices of `corpora.score` and of `corpora.drift`; the row `gprune` ranks by the metric, here averaged `act_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gprune import allocation
from gprune.calibration.statistics import CorpusStatistics
from gprune.checks import NonNegative
from gprune.errors import UserError
from gprune.importance.scores import Scores
from gprune.models.blocks import Block
from gprune.sparsity.budget import Budget


@torch.no_grad()
def removal_order(weight: Tensor, gram: Tensor, removed: int, *, ridge: float) -> Tensor:
    """Order the neurons of a block, (N,) int64: the `removed` ones that go greedily, the first one first.

    Then those that stay, by what the loss of each alone would cost. Least squares leaves the error

        E(R) = min over V of tr (W - V) A (W - V)^T = tr W_R (M_RR)^-1 W_R^T,    A = G + lambda I,  M = A^-1,

    where V is zero in the neurons R that are gone. With the V and M that R leaves, neuron j adds ||V_j||^2 / M_jj; then
    V becomes V - V_j M_j / M_jj, and M becomes M - M_j M_j^T / M_jj. Of both only the diagonal of M and the squared
    norms of V are kept: V_j and M_j are made when j goes, from those that went before. float64.

    Args:
        weight: W (H, N); gram: G, the sum of x x^T, (N, N).
        ridge: lambda over the mean diagonal of G.
    """
    A, W = gram.double(), weight.double()
    (H, N), damping = W.shape, max(ridge, torch.finfo(torch.float32).eps * len(A))
    damping *= float(A.diagonal().mean().clamp_min(1e-12))
    M = torch.cholesky_inverse(torch.linalg.cholesky(A + damping * torch.eye(N, dtype=A.dtype)))
    left, norms, gone = M.diagonal().clone(), W.square().sum(0), torch.zeros(N, dtype=torch.bool)  # of M and V
    rows, columns, order = torch.zeros(removed, N, dtype=A.dtype), torch.zeros(removed, H, dtype=A.dtype), []
    for k in range(removed):  # V = W - columns^T rows, M = A^-1 - rows^T rows
        j = int((norms / left).masked_fill_(gone, math.inf).argmin())
        column = (W[:, j] - rows[:k, j] @ columns[:k]) / left[j].sqrt()
        of_m, of_v = torch.stack([rows[:k, j], columns[:k] @ column]) @ rows[:k]
        row = (M[j] - of_m) / left[j].sqrt()
        norms = (norms - 2 * row * (column @ W - of_v) + row.square() * column.square().sum()).clamp_min(0)
        left = (left - row.square()).clamp_min(torch.finfo(A.dtype).tiny)
        rows[k], columns[k], gone[j] = row, column, True
        order.append(j)
    rest = (norms / left).masked_fill_(gone, math.inf).argsort(stable=True)[: N - removed]
    return torch.cat([torch.tensor(order, dtype=torch.long), rest])


@allocation("greedy")
def greedy(
    scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget, *, ridge: NonNegative = 0.01
) -> tuple[list[Tensor], list[Tensor]]:
    """m_i = (place in the order of removal) / N: every block loses the same fraction, whatever the scores."""
    margins = []
    for block, channels in zip(blocks, statistics.ffn, strict=True):
        gram = channels.total.gram
        if block.has_experts or gram is None or budget.costs.attention:
            needed = "--sparsity.scope ffn, dense blocks and --recovery least_squares"
            raise UserError(f"--sparsity.allocation greedy: expected {needed}.")
        weight, N = block.down.weight.detach().cpu(), block.neurons
        order = removal_order(weight, gram.cpu(), min(N, math.ceil(budget.sparsity * N) + 1), ridge=ridge)
        places = torch.empty(N, dtype=torch.float64)
        places[order] = (torch.arange(N, dtype=torch.float64) + 0.5) / N
        margins.append(places)
    return margins, [torch.ones_like(groups) for groups in scores.attention]
