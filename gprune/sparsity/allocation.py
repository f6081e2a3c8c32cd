"""How sparse each block becomes before anything is learned: margins for `masks.keep_masks`, one function per rule.

A rule sees scores and statistics and says how far every unit lies above the line; the budget then removes the lowest
margins over the whole model, to the parameter. `learned` thresholds (gprune) start from one of these rules.

    @ALLOCATION.register("mine")
    def mine(scores, statistics, blocks, sparsity):
        return scores.ffn, scores.attention         # raw scores compared across blocks
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gprune.calibration.statistics import CorpusStatistics
from gprune.errors import UserError
from gprune.importance.scores import Scores
from gprune.models.blocks import Block
from gprune.models.masks import Masks
from gprune.partition.drift import fractional_ranks
from gprune.registry import Registry
from gprune.sparsity.masks import top_of_experts

Margins = tuple[list[Tensor], list[Tensor]]  # neurons (N,) and KV groups (G,) per block, float64; smallest goes first
ALLOCATION: Registry[Callable[..., Margins]] = Registry("allocation")


def allocate(name: str, scores: Scores, *args: object, **options: object) -> Margins:
    """Margins by the rule `name`, checked: what a user registers must not end in masks of chance.

    Raises:
        UserError: for margins of another shape than the scores, or that are no numbers.
    """
    neurons, groups = ALLOCATION[name](scores, *args, **options)
    expected = [tuple(s.shape) for s in (*scores.ffn, *scores.attention)]
    got = [tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__ for m in (*neurons, *groups)]
    if got != expected:
        wrong = next((g for g, e in zip(got, expected, strict=False) if g != e), f"{len(got)} of them")
        raise UserError(
            f"Allocation '{name}': expected margins of {len(scores.ffn)} blocks' neurons and KV groups, shaped as "
            f"the scores are, got {wrong}."
        )
    if any(bool(torch.isnan(m).any()) for m in (*neurons, *groups)):
        raise UserError(f"Allocation '{name}': expected margins that are numbers, got NaN.")
    return neurons, groups


@ALLOCATION.register("uniform")
def uniform(scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], sparsity: float) -> Margins:
    """m_i = r_i, the rank inside the block in (0, 1): every block loses the same fraction."""
    return _ranks(scores, blocks), [fractional_ranks(s) for s in scores.attention]


def _ranks(scores: Scores, blocks: Sequence[Block]) -> list[Tensor]:
    """Of every neuron inside its block, or its expert."""
    return [fractional_ranks(s, groups=b.experts) for s, b in zip(scores.ffn, blocks, strict=True)]


@ALLOCATION.register("global")
def standardised(scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], sparsity: float) -> Margins:
    """m_i = (s_i - mean s) / std s inside the block, then one threshold: FLAP's adaptive search (arXiv 2312.11983).

    Attention channels are standardised before a KV group averages its own, as in the authors' repository. Constant
    scores have margin 0. The repository counts a head as 512/3 neurons, which is right for LLaMA's shapes; here
    parameters are counted.
    """

    def z(s: Tensor) -> Tensor:
        std = s.std(correction=0)
        # rounding gives equal numbers a standard deviation above 0
        return (s - s.mean()) / std if std > 0 and s.min() < s.max() else torch.zeros_like(s)

    groups = [z(c).view(len(g), -1).mean(1) for c, g in zip(scores.channels, scores.attention, strict=True)]
    return [z(s) for s in scores.ffn], groups


@ALLOCATION.register("owl")
def outlier_weighted(
    scores: Scores,
    statistics: CorpusStatistics,
    blocks: Sequence[Block],
    sparsity: float,
    *,
    multiple: float = 5.0,
    spread: float = 0.08,
) -> Margins:
    """m_i = r_i - S_b: block b loses S_b, less where it has more outliers (OWL, arXiv 2310.05175).

    D_b = share of the elements A_ij = |W_ij| ||X_j||_2 that exceed `multiple` x mean A (the paper's M); D scaled to
    [0, 2 `spread`] and centred is taken off the sparsity: S_b averages to it and spans 2 `spread` (the paper's lambda).
    M and lambda are the authors' for LLaMA. A is of the projection whose units go (down for neurons, output for KV
    groups), where the paper, which removes single weights, takes all linear layers of the block.
    """

    def sparsities(kind: str, part: str) -> Tensor:
        shares = []
        for block, channel in zip(blocks, getattr(statistics, kind), strict=True):
            A = getattr(block, part).weight.detach().float().cpu().abs() * channel.total.mean_sq.sqrt().float()
            shares.append((multiple * A.mean() < A).double().mean())
        D = torch.stack(shares)
        width = D.max() - D.min()
        D = (D - D.min()) / width * 2 * spread if width > 0 else torch.zeros_like(D)
        return sparsity - (D - D.mean())

    ffn, attention = sparsities("ffn", "down"), sparsities("attention", "output")
    return (
        [r - S for r, S in zip(_ranks(scores, blocks), ffn, strict=True)],
        [fractional_ranks(s) - S for s, S in zip(scores.attention, attention, strict=True)],
    )


def depth_masks(
    scores: Scores,
    statistics: CorpusStatistics,
    blocks: Sequence[Block],
    *,
    target: int,
    width_multiple: int = 1,
    protected: frozenset[int] = frozenset(),
) -> Masks:
    """Whole blocks go, the least influential first: ShortGPT (arXiv 2403.03853), BI_b = 1 - E cos(x_b, x_b+1).

    Blocks go until the next one would remove more than `target` parameters. That one stays, but loses its neurons of
    lowest score until the target is met, so that the baseline is matched on total parameters; if its FFN is not enough
    it goes as well, attention and norms included. Attention goes with its block whatever the scope. A width that is
    changed ends up on a multiple of `width_multiple`.

    Raises:
        ValueError: if the target leaves no block.
    """
    masks = Masks([torch.ones(b.experts * b.neurons, dtype=torch.bool) for b in blocks],
                  [torch.ones(b.kv_groups, dtype=torch.bool) for b in blocks])  # fmt: skip
    influence = statistics.influence.clone()
    influence[list(protected)] = float("inf")
    left = target
    for index in influence.argsort(stable=True).tolist():
        if left <= 0:
            return masks
        if index in protected:
            break
        block = blocks[index]
        kept = max(block.neurons + -left // block.neuron_cost, 0) // width_multiple * width_multiple
        if left >= block.cost or kept == 0:
            masks.ffn[index][:] = False
            masks.attention[index][:] = False
            left -= block.cost
        else:
            masks.ffn[index] = top_of_experts(scores.ffn[index], kept, experts=block.experts)
            return masks
    if left > 0 or not any(masks.blocks):
        raise ValueError(f"depth: {target} parameters would leave no block")
    return masks
