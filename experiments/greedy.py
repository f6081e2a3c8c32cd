"""Greedy removal of neurons with compensation, as an allocation, to compare with scores before least squares.

    python train.py --config protocol --config untrained --model.name smollm2-135m --import experiments/greedy.py \\
        --sparsity.allocation greedy

In each block, neurons are removed one by one: each time the neuron whose removal increases the error of the output
projection least, after the remaining neurons have compensated for it. OSSCAR (arXiv 2403.12983), ZipLM (2302.04089) and
SlimGPT (2412.18110) have this objective. All blocks lose the same fraction. The Gram matrices of the row `averaged` are
those of all scoring corpora together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gprune import allocation
from gprune.calibration.statistics import CorpusStatistics
from gprune.checks import NonNegative
from gprune.errors import UserError
from gprune.importance.scores import Scores
from gprune.models.units import output_weight
from gprune.sparsity.budget import Budget


@torch.no_grad()
def removal_order(weight: Tensor, gram: Tensor, removed: int, *, ridge: float) -> Tensor:
    """Order the neurons of a block, (N,) int64: first the `removed` greedily removed neurons in order of removal.

    The remaining neurons follow, ordered by the error that each would add. After least squares, the error is

        E(R) = min over V of tr (W - V) A (W - V)^T = tr W_R (M_RR)^-1 W_R^T,    A = G + lambda I,  M = A^-1,

    where V is zero in the removed neurons R. Given V and M after the removal of R, neuron j adds ||V_j||^2 / M_jj. Then
    V becomes V - V_j M_j / M_jj, and M becomes M - M_j M_j^T / M_jj. Only the diagonal of M and the squared norms of V
    are stored; V_j and M_j are computed from the earlier ones when j is removed. float64.

    Args:
        weight: W (H, N); gram: G, the sum of x x^T, (N, N).
        ridge: lambda over the mean diagonal of G.
    """
    A, W = gram.double(), weight.double()
    (H, N), damping = W.shape, max(ridge, torch.finfo(torch.float32).eps * len(A))
    damping *= float(A.diagonal().mean().clamp_min(1e-12))
    M = torch.cholesky_inverse(torch.linalg.cholesky(A + damping * torch.eye(N, dtype=A.dtype)))
    diagonal, norms, is_removed = (
        M.diagonal().clone(),
        W.square().sum(0),
        torch.zeros(N, dtype=torch.bool),
    )  # of M and V
    rows, columns, order = torch.zeros(removed, N, dtype=A.dtype), torch.zeros(removed, H, dtype=A.dtype), []
    for k in range(removed):  # V = W - columns^T rows, M = A^-1 - rows^T rows
        j = int((norms / diagonal).masked_fill_(is_removed, math.inf).argmin())
        column = (W[:, j] - rows[:k, j] @ columns[:k]) / diagonal[j].sqrt()
        of_m, of_v = torch.stack([rows[:k, j], columns[:k] @ column]) @ rows[:k]
        row = (M[j] - of_m) / diagonal[j].sqrt()
        norms = (norms - 2 * row * (column @ W - of_v) + row.square() * column.square().sum()).clamp_min(0)
        diagonal = (diagonal - row.square()).clamp_min(torch.finfo(A.dtype).tiny)
        rows[k], columns[k], is_removed[j] = row, column, True
        order.append(j)
    rest = (norms / diagonal).masked_fill_(is_removed, math.inf).argsort(stable=True)[: N - removed]
    return torch.cat([torch.tensor(order, dtype=torch.long), rest])


@allocation("greedy")
def greedy(
    scores: Scores, statistics: CorpusStatistics, layers: Sequence[nn.Module], budget: Budget, *,
    ridge: NonNegative = 0.01,
) -> dict[str, Tensor]:  # fmt: skip
    """m_i = (position in the order of removal) / N. All blocks lose the same fraction, and scores are ignored."""
    margins = {}
    for u in budget.of_kind("neurons"):
        gram = statistics.channels[u.key].total.gram
        if u.rows > 1 or gram is None or budget.finer != ("neurons",):
            needed = "--sparsity.scope ffn, dense blocks and --recovery least_squares"
            raise UserError(f"--sparsity.allocation greedy needs {needed}.")
        weight, N = output_weight(u, layers[u.layer]), u.count
        order = removal_order(weight, gram.cpu(), min(N, math.ceil(budget.sparsity * N) + 1), ridge=ridge)
        places = torch.empty(N, dtype=torch.float64)
        places[order] = (torch.arange(N, dtype=torch.float64) + 0.5) / N
        margins[u.key] = places
    return margins
