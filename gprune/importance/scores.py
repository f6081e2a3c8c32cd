"""Scores of all units by a metric: checked, separately for each expert, and summed over the channels of a KV group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, reduce
from scipy.stats import rankdata
from torch import Tensor

from gprune.calibration.statistics import CorpusStatistics, Moments
from gprune.importance.metrics import IMPORTANCE, magnitude
from gprune.importance.weights import UnitWeights, attention_weights, ffn_weights
from gprune.models.blocks import Block

SEED_STRIDE = 100_003  # a prime; seeds of the same block in two runs differ by a multiple of it


@dataclass(frozen=True)
class Scores:
    """Importance scores, float64, one tensor per block."""

    ffn: list[Tensor]  # neurons (N,), or (E x N,) with E experts
    attention: list[Tensor]  # KV groups (G,): sums over their channels
    channels: list[Tensor]  # attention channels (C,)


def score_channels(name: str, weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """Return scores by the metric `name`, (C,) float64. The metric gets a copy of the moments."""
    with IMPORTANCE.unchanged(name, *weights.inputs, weights.output):
        scores = IMPORTANCE[name](weights, moments.copy(), generator)
    return IMPORTANCE.checked(name, "scores", scores, weights.output.shape[1:]).cpu().double()


def score_ffn(name: str, block: Block, weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """Return scores of a block's neurons, (experts x neurons,) float64, each expert scored separately.

    Experts without any routed token have no activations. Their neurons are ranked by `magnitude`, and the score at rank
    j is the mean of the other experts' scores at rank j. This is our choice.
    """
    if not block.has_experts:
        return score_channels(name, weights, moments, generator)
    E = block.experts
    by_expert = []
    for e in range(E):
        by_expert.append(score_channels(name, weights.of_expert(e, E), moments.of_expert(e, E), generator))
    scores = torch.stack(by_expert)  # (E, neurons)
    idle = moments.count.view(E, -1)[:, 0] == 0  # (E,) experts without any routed token
    if not IMPORTANCE[name].activation_free and idle.any() and not idle.all():
        score_of_rank = scores[~idle].sort(1).values.mean(0)
        magnitudes = rearrange(magnitude(weights, moments, generator), "(e n) -> e n", e=E)
        ranks = magnitudes[idle].argsort(dim=1, stable=True).argsort(dim=1)
        scores[idle] = score_of_rank[ranks]
    return scores.flatten()


def generator_for(seed: int, block_index: int, kind: str) -> torch.Generator:
    """Return a separate random generator for every block and kind (`ffn`, `attention`)."""
    is_attention = int(kind == "attention")
    # All blocks and kinds have different seeds, also between runs, if the model has fewer than 50,000 blocks.
    return torch.Generator().manual_seed(seed * SEED_STRIDE + 2 * block_index + is_attention)


def score_units(
    name: str, blocks: Sequence[Block], statistics: CorpusStatistics, *, seed: int = 0, attention: bool = True
) -> Scores:
    """Return scores of every unit by the metric `name`."""

    def channel_scores(block: Block) -> Tensor:
        """Return the scores of a block's attention channels, (C,); zeros, (G,), if attention is not in scope."""
        if not attention or block.output is None:
            return torch.zeros(block.kv_groups, dtype=torch.float64)
        generator = generator_for(seed, block.index, "attention")
        moments = statistics.attention[block.index].total
        return score_channels(name, attention_weights(block), moments, generator)

    def neuron_scores(block: Block) -> Tensor:
        """Return the scores of a block's neurons, (E x N,); empty without an FFN."""
        if block.down is None:
            return torch.zeros(0, dtype=torch.float64)
        generator = generator_for(seed, block.index, "ffn")
        moments = statistics.ffn[block.index].total
        return score_ffn(name, block, ffn_weights(block), moments, generator)

    def group_scores(block: Block, channels: Tensor) -> Tensor:
        """Return the scores of a block's KV groups, (G,): sums of the scores of their channels."""
        if not block.kv_groups:
            return channels  # empty
        return reduce(channels, "(g c) -> g", "sum", g=block.kv_groups)

    ffn = [neuron_scores(block) for block in blocks]
    channels = [channel_scores(block) for block in blocks]
    groups = [group_scores(*pair) for pair in zip(blocks, channels, strict=True)]
    return Scores(ffn, groups, channels)


def fractional_ranks(scores: Tensor, *, groups: int = 1, ties: Literal["average", "ordinal"] = "average") -> Tensor:
    """Return r_i = (rank of s_i + 0.5) / N with ranks from 0: (..., groups x N) float64, strictly inside (0, 1)."""
    if not scores.shape[-1]:  # a block without such units
        return scores.detach().cpu().double()
    by_group = scores.detach().cpu().double().unflatten(-1, (groups, -1))
    ranks = rankdata(by_group.numpy(), method=ties, axis=-1)  # from 1
    return torch.from_numpy((ranks - 0.5) / by_group.shape[-1]).flatten(-2)
