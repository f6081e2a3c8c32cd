"""Importance metrics of units and of whole experts: one pure function each, larger = keep.

A metric gets weights and moments of the *channels* that enter an output projection (`down_proj` for neurons, `o_proj`
for attention), and returns one score per channel. The score of a KV group is the sum over its channels (query heads of
the group x head_dim). Weights must not be changed; moments are a copy.

    @metric("my_metric")
    def my_metric(weights, moments, generator):
        return moments.mean_sq.sqrt()

Symbols in docstrings: W (H, C) is the output projection, and W_:j its column of channel j. V_j are the rows that
compute the channel (gate and up; value). X_j are the activations of the channel over all n tokens, so ||X_j||_2^2 / n
is the mean square. Scores are >= 0, and only their order matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gprune.registry import Registry

if TYPE_CHECKING:  # this registry is imported to check flags, which should not wait for PyTorch
    import torch
    from torch import Tensor

    from gprune.calibration.statistics import Moments, Routing


@dataclass(frozen=True)
class UnitWeights:
    """Weights of C channels with H hidden dimensions, float32.

    For neurons `inputs` are the rows of gate and up, or of up only without a gate. For attention they are the value
    rows, repeated for the query heads that share them, because a channel of the output projection's input is a weighted
    mean over tokens of the value row's output.
    """

    inputs: tuple[Tensor, ...]  # each (C, H)
    output: Tensor  # (H, C)

    def of_expert(self, index: int, experts: int) -> UnitWeights:
        """Return the weights of one expert, C / experts channels."""
        per_expert = self.output.shape[1] // experts
        channels = slice(per_expert * index, per_expert * (index + 1))
        inputs = tuple(rows[channels] for rows in self.inputs)
        return replace(self, inputs=inputs, output=self.output[:, channels])


IMPORTANCE: Registry[Callable[..., Tensor]] = Registry("importance metric")


def metric(
    name: str, *, activation_free: bool = False, needs: Collection[str] = ()
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register an importance metric, a function of one projection, as the value `name` of `--importance`.

    The metric is called as `function(weights, moments, generator)` for the C neurons (or attention channels) of a
    block. It returns their scores, (C,) of any float dtype, finite. Units with the smallest scores are removed first.

    - weights: `importance.metrics.UnitWeights`, float32: output (H, C), the columns that write to the H hidden
      dimensions, and inputs, a tuple of (C, H): gate and up rows, or value rows of attention.
    - moments: `calibration.statistics.Moments` of inputs of the output projection, float64: count (), number of tokens;
      sum, sum_sq, mean, mean_sq and variance (C,); saliency (C,) if the metric needs it.
    - generator: `torch.Generator` of this block, for random metrics.

    The function must not change its arguments in place.

    Example:

        import gprune

        @gprune.metric("energy")
        def energy(weights, moments, generator):
            return weights.output.norm(dim=0) * moments.mean_sq.sqrt()

    Args:
        name: the value of `--importance`.
        activation_free: whether the score ignores `moments`. Such a metric can be used for unreliable modules; as it
            has no rank drift itself, the drift of `act_norm` is used.
        needs: `["saliency"]` if the function reads `moments.saliency`, which is collected only on demand.

    Raises:
        ValueError: if `needs` has another name, or another metric has this name.
        UserError: if the name has characters that are not allowed.
    """
    if unknown := set(needs) - {"saliency"}:
        raise ValueError(f"The needs of metric '{name}' must be among saliency; got {sorted(unknown)}.")

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Register the metric in `IMPORTANCE` with its properties, and return it."""
        function.activation_free = activation_free
        function.needs = frozenset(needs)
        function.drift = "act_norm" if activation_free else name
        return IMPORTANCE.register(name)(function)

    return decorate


# Whole experts

EXPERT_IMPORTANCE: Registry[Callable[..., Tensor]] = Registry("expert metric")


def expert_metric(
    name: str, *, activation_free: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register an importance metric of whole experts, as the value `name` of `--sparsity.expert_metric`.

    The metric is called as `function(weights, routing, generator)` for the E experts of a block. It returns their
    scores, (E,) of any float dtype, finite. Experts with the smallest scores are removed first.

    - weights: `importance.metrics.UnitWeights`, float32, of all E x N neurons: output (H, E x N) and inputs, a tuple of
      (E x N, H). `weights.of_expert(e, E)` has those of one expert.
    - routing: `calibration.statistics.Routing`, float64, sums over the tokens that are routed to each expert: count,
      weight (of the router), norm (of the expert's output) and weighted_norm, (E,) each; `routing.mean("norm")`.
    - generator: `torch.Generator` of this block, for random metrics.

    The function must not change its arguments in place.

    Example:

        import gprune

        @gprune.expert_metric("load")
        def load(weights, routing, generator):
            return routing.weight

    Args:
        name: the value of `--sparsity.expert_metric`.
        activation_free: whether the score ignores `routing`. Otherwise experts that no calibration token reaches get
            the score -inf.

    Raises:
        ValueError: if another metric has this name.
        UserError: if the name has characters that are not allowed.
    """

    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Register the metric in `EXPERT_IMPORTANCE` with its property, and return it."""
        function.activation_free = activation_free
        return EXPERT_IMPORTANCE.register(name)(function)

    return decorate


@expert_metric("reap")
def reap(weights: UnitWeights, routing: Routing, generator: torch.Generator) -> Tensor:
    """s_e = mean over the tokens routed to e of w_e ||f_e(x)||_2: REAP (arXiv 2510.13999, eq. 9).

    w_e is the weight by which the model multiplies the output f_e(x). For a router with a softmax this is the authors'
    definition, with their `renormalize_router_weights` as the model does. For other routers, such as those with a
    sigmoid, their code takes a softmax over the logits instead.
    """
    return routing.mean("weighted_norm")


@expert_metric("frequency")
def frequency(weights: UnitWeights, routing: Routing, generator: torch.Generator) -> Tensor:
    """s_e = the number of tokens that are routed to e."""
    return routing.count


@expert_metric("output_norm")
def output_norm(weights: UnitWeights, routing: Routing, generator: torch.Generator) -> Tensor:
    """s_e = mean over the tokens routed to e of ||f_e(x)||_2 (`ean_mean` in REAP's repository)."""
    return routing.mean("norm")


@expert_metric("random", activation_free=True)
def random_expert(weights: UnitWeights, routing: Routing, generator: torch.Generator) -> Tensor:
    """s_e ~ Uniform(0, 1) from the seeded generator, as a control."""
    import torch

    return torch.rand(len(routing.count), generator=generator, dtype=torch.float64)


# Activations


@metric("wanda_sp")
def wanda_sp(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = ||X_j||_2 * sum_i |W_ij|: Wanda's |W| ||X|| (arXiv 2306.11695, eq. 1) summed over a column.

    The norm is divided by sqrt(n), which does not change ranks. FLAP (arXiv 2312.11983) uses this structured form as a
    baseline. Its repository prunes each block before it calibrates the next one; here calibration uses the dense model,
    as for every other metric.
    """
    return moments.mean_sq.sqrt() * weights.output.abs().sum(0)


@metric("wifv")
def wifv(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = Var(X_j) * ||W_:j||_2^2, FLAP's weighted input feature variance (arXiv 2312.11983, eq. 5).

    The population variance over tokens, as in the paper. The authors' code updates a running variance with the new mean
    instead of the old one, skips the first window, and squares the scores of attention.
    """
    return moments.variance * weights.output.square().sum(0)


@metric("ifv")
def ifv(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = Var(X_j), FLAP's input feature variance (arXiv 2312.11983): `wifv` without weights."""
    return moments.variance


@metric("wifn")
def wifn(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = (||X_j||_2 * mean_i |W_ij|)^2 / n, FLAP's weighted input feature norm (arXiv 2312.11983).

    The mean over rows is that of the authors' repository, and so is the square for attention channels, which are added
    per head. Because of it KV groups can have another order than by `wanda_sp`. Neurons are squared only here, which
    keeps their order: that of `wanda_sp`.
    """
    return (moments.mean_sq.sqrt() * weights.output.abs().mean(0)).square()


@metric("act_norm")
def act_norm(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = ||X_j||_2 / sqrt(n): root mean square activation, without weights."""
    return moments.mean_sq.sqrt()


# Gradients


@metric("taylor", needs=("saliency",))
def taylor(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = sum_k |w_k g_k|: LLM-Pruner's element-wise, first-order Taylor importance (arXiv 2305.11627).

    This is eq. 5 of the paper without its second term (`param_first` in its repository), computed by the collector as
    `moments.saliency`. k runs over all weights of the channel: gate and up rows and down column (or query, key and
    value rows and the column of the output projection). A KV group counts its key and value rows once. g is the
    gradient of the mean next-token cross-entropy over the calibration windows.
    """
    return moments.saliency


# Weights only


@metric("magnitude", activation_free=True)
def magnitude(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = ||W_:j||_2 * prod over V_j of ||V_j||_2, invariant to rescalings that do not change the model's output."""
    return weights.output.norm(dim=0) * math.prod([rows.norm(dim=1) for rows in weights.inputs])


@metric("magnitude_down", activation_free=True)
def magnitude_down(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j = ||W_:j||_2, the L2 norm of the column of the output projection: FLAP's magnitude baseline (`mag_sp`)."""
    return weights.output.norm(dim=0)


@metric("random", activation_free=True)
def random(weights: UnitWeights, moments: Moments, generator: torch.Generator) -> Tensor:
    """s_j ~ Uniform(0, 1) from the seeded generator, as a control."""
    import torch

    return torch.rand(weights.output.shape[1], generator=generator)
