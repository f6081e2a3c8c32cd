"""Scores of all units by a metric, from weights and moments: each expert separately, and summed over KV groups."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from einops import rearrange
from scipy.stats import rankdata
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.calibration.statistics import CorpusStatistics, Moments, Routing
from gprune.importance.metrics import EXPERT_IMPORTANCE, IMPORTANCE, UnitWeights, magnitude
from gprune.models.families import decoder_layers
from gprune.models.units import input_weights, output_weight, units_of
from gprune.units.structure import Units, kinds_of_units

EMPTY: Mapping[str, Any] = MappingProxyType({})
SEED_STRIDE = 100_003  # a prime; seeds of the same block in two runs differ by a multiple of it


class Scores(dict[str, Tensor]):
    """Importance scores by key of units, float64: (N,) of neurons, (E x N,) with E experts, (G,) of KV groups."""

    channels: dict[str, Tensor]  # (C,) by key, of the channels of units with several; a unit has the sum of theirs
    experts: dict[str, Tensor]  # of whole experts, (E,) by key of the experts, if they are in scope

    def __init__(
        self, scores: Mapping[str, Tensor], channels: Mapping[str, Tensor] = EMPTY,
        experts: Mapping[str, Tensor] = EMPTY,
    ):  # fmt: skip
        super().__init__(scores)
        self.channels, self.experts = dict(channels), dict(experts)


def unit_weights(u: Units, layer: nn.Module, device: torch.device | str = "cpu") -> UnitWeights:
    """Return weights of the channels that read units, on a device."""
    return UnitWeights(input_weights(u, layer, device), output_weight(u, layer, device))


def score_channels(name: str, weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """Return scores by the metric `name`, (C,) float64. The metric gets a copy of the moments."""
    with IMPORTANCE.unchanged(name, *weights.inputs, weights.output):
        scores = IMPORTANCE[name](weights, moments.copy(), generator)
    return IMPORTANCE.checked(name, "scores", scores, weights.output.shape[1:]).cpu().double()


def channel_scores(name: str, u: Units, weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """Return scores of the channels that read units, (C,) float64; each expert is scored separately.

    Experts without any routed token have no activations. Their neurons are ranked by `magnitude`, and the score at rank
    j is the mean of the other experts' scores at rank j. This is our choice.
    """
    if moments.count.dim() == 0:  # experts have a number of tokens for each channel
        return score_channels(name, weights, moments, generator)
    E = u.rows
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


def score_units(
    name: str, model: PreTrainedModel, statistics: CorpusStatistics, *, seed: int = 0,
    scope: Collection[str] = ("neurons",),
) -> Scores:  # fmt: skip
    """Return scores of all units by the metric `name`, fine kinds first; 0 for kinds that are not in scope."""
    layers, units, scores, channels = decoder_layers(model), units_of(model), {}, {}
    kinds = kinds_of_units(units)
    for u in sorted(units, key=lambda u: kinds.index(u.kind), reverse=True):
        if u.kind in ("experts", "layer"):
            continue
        scores[u.key] = torch.zeros(u.size, dtype=torch.float64)
        if not u.reads or u.kind not in scope:
            continue
        moments, weights = statistics.channels[u.key].total, unit_weights(u, layers[u.layer])
        of_channels = channel_scores(name, u, weights, moments, generator_for(seed, u))
        if u.repeats == 1:
            scores[u.key] = of_channels
        else:
            scores[u.key], channels[u.key] = u.summed(of_channels), of_channels
    return Scores(scores, channels)


def score_experts(
    name: str, model: PreTrainedModel, statistics: CorpusStatistics, *, seed: int = 0
) -> dict[str, Tensor]:
    """Return scores of whole experts by the metric `name`, (E,) float64 by key of the experts.

    Experts without any routed token have the score -inf, unless the metric ignores activations. This is our choice.
    """
    layers, scores = decoder_layers(model), {}
    for u in units_of(model):
        if not u.inside:
            continue
        routing = Routing(*statistics.channels[u.key].routing.clone())
        weights, generator = unit_weights(u, layers[u.layer]), generator_for(seed, u)
        with EXPERT_IMPORTANCE.unchanged(name, *weights.inputs, weights.output, *vars(routing).values()):
            of_experts = EXPERT_IMPORTANCE[name](weights, routing, generator)
        of_experts = EXPERT_IMPORTANCE.checked(name, "scores", of_experts, (u.rows,)).cpu().double()
        if not EXPERT_IMPORTANCE[name].activation_free:
            of_experts = of_experts.where(routing.count > 0, -torch.inf)
        scores[u.inside] = of_experts
    return scores


def idle_experts(units: Iterable[Units], statistics: Sequence[CorpusStatistics]) -> str:
    """Return the experts that no token of any corpus reaches, such as 'layer 0: 3, 5; layer 2: 1'; empty if none."""
    by_layer = []
    for u in units:
        if u.inside:
            count = torch.stack([Routing(*corpus.channels[u.key].routing).count for corpus in statistics])
            if idle := (count.sum(0) == 0).nonzero()[:, 0].tolist():
                by_layer.append(f"layer {u.layer}: {', '.join(map(str, idle))}")
    return "; ".join(by_layer)


def generator_for(seed: int, u: Units) -> torch.Generator:
    """Return a separate random generator for the units of each block, and for neurons and others."""
    # All blocks and kinds have different seeds, also between runs, if the model has fewer than 50,000 blocks.
    return torch.Generator().manual_seed(seed * SEED_STRIDE + 2 * u.number + (u.kind != "neurons"))


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


def unit_ranks(u: Units, scores: Tensor, *, ties: Literal["average", "ordinal"] = "average") -> Tensor:
    """Return `fractional_ranks` of units, (..., rows x count) float64, separately for each of several experts."""
    return fractional_ranks(scores, groups=u.rows, ties=ties)


def comparable_scores(u: Units, scores: Tensor) -> Tensor:
    """Return scores of units on one scale, (..., rows x count): ranks if there are experts, whose scales differ."""
    return unit_ranks(u, scores) if u.rows > 1 else scores
