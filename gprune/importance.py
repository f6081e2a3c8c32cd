"""Importance of units: one pure function per metric, larger = keep.

A metric sees the *channels* that enter an output projection (`down_proj` for neurons, `o_proj` for attention),
their weights and their moments over a corpus, and returns one score per channel. A KV group's score is the sum
over its channels (its query heads x head_dim), so every metric means the same thing in both scopes.

    @metric("my_metric")
    def my_metric(weights, moments, generator):
        return moments.mean_sq.sqrt()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from gprune.architectures import Block
from gprune.registry import Registry
from gprune.statistics import CorpusStatistics, Moments

IMPORTANCE: Registry[Callable[..., Tensor]] = Registry("importance metric")


@dataclass(frozen=True)
class UnitWeights:
    """The weights of C channels with H hidden dimensions, float32.

    For neurons `inputs` are the gate and up rows; for attention the value rows, repeated for the query heads that
    share them (a channel of `o_proj` is a weighted mean over tokens of that value row's output).
    """

    inputs: tuple[Tensor, ...]  # each (C, H)
    output: Tensor  # (H, C)


def metric(name: str, *, activation_free: bool = False) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register `function(weights, moments, generator) -> (C,) scores` under `name`.

    Args:
        name: what `--importance` takes.
        activation_free: whether the score ignores `moments`. Its drift then comes from `act_norm`, and it may
            serve as the metric that unreliable modules switch to.
    """

    def file(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        function.activation_free = activation_free
        return IMPORTANCE.register(name)(function)

    return file


@metric("wanda_sp")
def wanda_sp(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = ||X_j||_2 * sum_i |W_ij|, Wanda's |W| ||X|| (arXiv 2306.11695, eq. 1) summed over a column.

    W (H, C) is the output projection, X_j the channel's activations over all tokens; s_j >= 0. The structured
    form is the baseline of FLAP (arXiv 2312.11983), whose code averages over rows and thus ranks alike.
    """
    return moments.mean_sq.sqrt() * weights.output.abs().sum(0)


@metric("wifv")
def wifv(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = Var(X_j) * ||W_:j||_2^2, FLAP's weighted input feature variance (arXiv 2312.11983, eq. 5); s_j >= 0.

    The variance is over tokens. The authors' code updates a running variance with the new mean in place of the
    old one; ours is the population variance that the paper describes.
    """
    return moments.variance * weights.output.square().sum(0)


@metric("act_norm")
def act_norm(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = sqrt(mean over tokens of X_j^2): root mean square activation, weights ignored; s_j >= 0."""
    return moments.mean_sq.sqrt()


@metric("magnitude", activation_free=True)
def magnitude(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = ||W_:j||_2 * prod over input rows of ||V_j||_2: the norms along the channel's path multiplied; s_j >= 0.

    W is the output projection, V the gate and up rows (or the value row). Scaling a row up and the column down by
    the same factor leaves the model, and this score, unchanged; a sum of norms would not survive that.
    """
    score = weights.output.norm(dim=0)
    for rows in weights.inputs:
        score = score * rows.norm(dim=1)
    return score


@metric("random", activation_free=True)
def random(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j ~ Uniform(0, 1) from the seeded generator: the control that every metric has to beat."""
    return torch.rand(weights.output.shape[1], generator=generator)


def ffn_weights(block: Block) -> UnitWeights:
    """(neurons,) channels of one block's FFN."""
    gate, up, down = (m.weight.detach().float().cpu() for m in (block.gate, block.up, block.down))
    return UnitWeights((gate, up), down)


def attention_weights(block: Block) -> UnitWeights:
    """(query heads x head_dim,) channels of one block's attention."""
    value = rearrange(block.value.weight.detach().float().cpu(), "(g d) h -> g d h", d=block.head_dim)
    heads = block.channels_per_group // block.head_dim
    return UnitWeights((repeat(value, "g d h -> (g q d) h", q=heads),), block.output.weight.detach().float().cpu())


@dataclass(frozen=True)
class Scores:
    """Importance per block: neurons (N,) and KV groups (G,), float64."""

    ffn: list[Tensor]
    attention: list[Tensor]


def score_units(
    name: str,
    blocks: Sequence[Block],
    statistics: CorpusStatistics,
    *,
    seed: int = 0,
    half: int | None = None,
) -> Scores:
    """Importance of every unit by the metric `name`, from all tokens of a corpus or from one half of them.

    Args:
        name: a registered metric.
        blocks: the model's blocks; their weights are read, not changed.
        statistics: of one corpus, or of several pooled.
        seed: for metrics that draw numbers; blocks and scopes draw from separate streams.
        half: 0 or 1 for half of the tokens, None for all.
    """
    function = IMPORTANCE[name]

    def scores(kind: str, block: Block, weights: UnitWeights) -> Tensor:
        channel = getattr(statistics, kind)[block.index]
        moments = channel.total if half is None else channel.halves[half]
        generator = torch.Generator().manual_seed(seed * 100_003 + 2 * block.index + (kind == "attention"))
        return function(weights, moments, generator).double()

    return Scores(
        [scores("ffn", block, ffn_weights(block)) for block in blocks],
        [
            reduce(scores("attention", b, attention_weights(b)), "(g c) -> g", "sum", c=b.channels_per_group)
            for b in blocks
        ],
    )
