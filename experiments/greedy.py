"""Greedy removal with compensation, as an allocation: is it better than scores of neurons, behind least squares?

    python train.py --config protocol untrained --model.name smollm2-135m --import experiments/greedy.py \\
        --sparsity.allocation greedy --evaluation.controls [averaged] --recovery least_squares

In each block, one neuron after the other goes: the one whose loss raises the error of the output projection least, once
the neurons that stay have made up for it. OSSCAR (arXiv 2403.12983), ZipLM (2302.04089) and SlimGPT (2412.18110) remove
by this objective. Blocks lose the same fraction each. The rows `base` and `averaged` have these masks, from the Gram
matrices of `corpora.score` and of `corpora.drift`; a row `gprune` ranks by its metric, as ever.
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
    V becomes V - V_j M_j / M_jj, and M becomes M - M_j M_j^T / M_jj. Of M only the diagonal is kept: a column is made
    when its neuron goes, from the columns before. About 2 N removed (H + removed) operations, in float64.

    Args:
        weight: W (H, N); gram: G, the sum of x x^T, (N, N).
        ridge: lambda over the mean diagonal of G.
    """
    A, V = gram.double(), weight.double().clone()
    N = len(A)
    damping = max(ridge, torch.finfo(torch.float32).eps * N) * A.diagonal().mean().clamp_min(1e-12)
    M = torch.cholesky_inverse(torch.linalg.cholesky(A + damping * torch.eye(N, dtype=A.dtype)))
    left, columns, order = M.diagonal().clone(), torch.zeros(removed, N, dtype=A.dtype), []
    gone = torch.zeros(N, dtype=torch.bool)
    for k in range(removed):
        j = int((V.square().sum(0) / left).masked_fill_(gone, math.inf).argmin())
        columns[k] = (M[j] - columns[:k, j] @ columns[:k]) / left[j].sqrt()
        V.addr_(V[:, j] / left[j].sqrt(), columns[k], alpha=-1)
        left = (left - columns[k].square()).clamp_min(torch.finfo(A.dtype).tiny)
        gone[j] = True
        order.append(j)
    rest = (V.square().sum(0) / left).masked_fill_(gone, math.inf).argsort(stable=True)[: N - removed]
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
