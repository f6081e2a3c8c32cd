"""Scores of all units by a metric, from weights and moments: each expert separately, and summed over KV groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange, reduce
from scipy.stats import rankdata
from torch import Tensor

from gprune.calibration.statistics import CorpusStatistics, Moments, Routing
from gprune.importance.metrics import EXPERT_IMPORTANCE, IMPORTANCE, UnitWeights, magnitude
from gprune.models.blocks import Block, ExpertPart, Part

SEED_STRIDE = 100_003  # a prime; seeds of the same block in two runs differ by a multiple of it


@dataclass(frozen=True)
class Scores:
    """Importance scores, float64, one tensor per block."""

    ffn: list[Tensor]  # neurons (N,), or (E x N,) with E experts
    attention: list[Tensor]  # KV groups (G,): sums over their channels
    channels: list[Tensor]  # attention channels (C,); (G,) zeros if attention is not in scope
    experts: list[Tensor] = field(default_factory=list)  # whole experts (E,), if they are in scope


def ffn_weights(block: Block, device: torch.device | str = "cpu") -> UnitWeights:
    """Return weights of the experts x neurons channels of a block's FFN, on a device."""
    parts = [part for part in (block.gate, block.up) if part is not None]
    return UnitWeights(tuple(_weight(part, device) for part in parts), _weight(block.down, device))


def attention_weights(block: Block) -> UnitWeights:
    """Return weights of the query heads x head_dim channels of a block's attention."""
    rows = block.per_query_head(_weight(block.value))
    return UnitWeights((rows,), _weight(block.output))


def _weight(part: Part | ExpertPart, device: torch.device | str = "cpu") -> Tensor:
    return part.weight.detach().float().to(device)


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


def score_experts(name: str, blocks: Sequence[Block], statistics: CorpusStatistics, *, seed: int = 0) -> list[Tensor]:
    """Return scores of whole experts by the metric `name`, (E,) float64; (0,) for blocks without experts."""
    return [
        _score_experts(name, block, Routing(*statistics.ffn[block.index].routing.clone()), seed)
        if block.has_experts else torch.zeros(0, dtype=torch.float64)
        for block in blocks
    ]  # fmt: skip


def _score_experts(name: str, block: Block, routing: Routing, seed: int) -> Tensor:
    """Return scores of a block's experts by the metric `name`, (E,) float64.

    Experts without any routed token have the score -inf, unless the metric ignores activations. This is our choice.
    """
    weights, generator = ffn_weights(block), generator_for(seed, block.index, "ffn")
    with EXPERT_IMPORTANCE.unchanged(name, *weights.inputs, weights.output, *vars(routing).values()):
        scores = EXPERT_IMPORTANCE[name](weights, routing, generator)
    scores = EXPERT_IMPORTANCE.checked(name, "scores", scores, (block.experts,)).cpu().double()
    if EXPERT_IMPORTANCE[name].activation_free:
        return scores
    return scores.where(routing.count > 0, -torch.inf)


def idle_experts(blocks: Sequence[Block], statistics: Sequence[CorpusStatistics]) -> str:
    """Return the experts that no token of any corpus reaches, such as 'layer 0: 3, 5; layer 2: 1'; empty if none."""
    by_layer = []
    for block in blocks:
        if block.has_experts:
            count = torch.stack([Routing(*corpus.ffn[block.index].routing).count for corpus in statistics])
            if idle := (count.sum(0) == 0).nonzero()[:, 0].tolist():
                by_layer.append(f"layer {block.layer_index}: {', '.join(map(str, idle))}")
    return "; ".join(by_layer)


def generator_for(seed: int, block_index: int, kind: str) -> torch.Generator:
    """Return a separate random generator for every block and kind (`ffn`, `attention`)."""
    is_attention = int(kind == "attention")
    # All blocks and kinds have different seeds, also between runs, if the model has fewer than 50,000 blocks.
    return torch.Generator().manual_seed(seed * SEED_STRIDE + 2 * block_index + is_attention)


def score_units(
    name: str, blocks: Sequence[Block], statistics: CorpusStatistics, *, seed: int = 0, attention: bool = True
) -> Scores:
    """Return scores of every neuron and KV group by the metric `name`.

    Attention has the score 0 if it is not in scope.
    """
    ffn, groups, channels = [], [], []
    for block in blocks:
        neuron_scores = torch.zeros(0, dtype=torch.float64)  # without an FFN
        if block.down is not None:
            moments, generator = statistics.ffn[block.index].total, generator_for(seed, block.index, "ffn")
            neuron_scores = score_ffn(name, block, ffn_weights(block), moments, generator)
        channel_scores = torch.zeros(block.kv_groups, dtype=torch.float64)
        if attention and block.output is not None:
            moments, generator = statistics.attention[block.index].total, generator_for(seed, block.index, "attention")
            channel_scores = score_channels(name, attention_weights(block), moments, generator)
        group_scores = channel_scores  # (0,) without KV groups
        if block.kv_groups:
            group_scores = reduce(channel_scores, "(g c) -> g", "sum", g=block.kv_groups)
        ffn.append(neuron_scores)
        groups.append(group_scores)
        channels.append(channel_scores)
    return Scores(ffn, groups, channels)


def fractional_ranks(scores: Tensor, *, groups: int = 1, ties: Literal["average", "ordinal"] = "average") -> Tensor:
    """Return r_i = (rank of s_i + 0.5) / N with ranks from 0: (..., groups x N) float64, strictly inside (0, 1).

    Each of the `groups` of N consecutive scores is ranked separately. Equal scores have their average rank or, with
    `ties` "ordinal", ranks in their order.
    """
    if not scores.shape[-1]:  # a block without such units
        return scores.detach().cpu().double()
    by_group = scores.detach().cpu().double().unflatten(-1, (groups, -1))
    ranks = rankdata(by_group.numpy(), method=ties, axis=-1)  # from 1
    return torch.from_numpy((ranks - 0.5) / by_group.shape[-1]).flatten(-2)


def neuron_ranks(block: Block, scores: Tensor, *, ties: Literal["average", "ordinal"] = "average") -> Tensor:
    """Return `fractional_ranks` of a block's neurons, (..., E x N) float64, separately for each of its experts."""
    return fractional_ranks(scores, groups=block.experts, ties=ties)


def comparable_scores(block: Block, scores: Tensor) -> Tensor:
    """Return scores of a block's neurons on one scale, (..., E x N): ranks if it has experts, whose scales differ."""
    return neuron_ranks(block, scores) if block.has_experts else scores
