"""Allocation rules, one function each: they determine the sparsity of every block or module.

A rule computes a margin for every unit from scores and statistics. Units with the lowest margins in the whole model are
then removed until the budget is met. A rule may return keep masks instead of margins (`depth`). Rules for modules
(`learned`, `equal`) compute a threshold for each module from such masks and the ranks inside modules.

    @allocation("mine")
    def mine(scores, statistics, blocks, budget, *, power=1.0):      # --sparsity.options.power 2
        return [s**power for s in scores.ffn], scores.attention      # scores are compared across blocks
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gprune.checks import AtLeast1Float, NonNegative
from gprune.registry import Registry

if TYPE_CHECKING:  # this registry is imported to check flags, which should not wait for PyTorch
    from torch import Tensor

    from gprune.calibration.statistics import CorpusStatistics
    from gprune.importance.scores import Scores
    from gprune.models.blocks import Block
    from gprune.models.masks import Masks
    from gprune.partition.modules import ModuleRanks
    from gprune.sparsity.budget import Budget
    from gprune.sparsity.thresholds import Thresholds

# Per block: neurons (N,), KV groups (G,); float64; smallest is removed first.
Margins = tuple[list["Tensor"], list["Tensor"]]
Rule = Callable[..., Any]
ALLOCATION: Registry[Rule] = Registry("allocation")


def allocation(
    name: str, *, modules: bool = False, learned: bool = False, whole_blocks: bool = False, errors: bool = False
) -> Callable[[Rule], Rule]:
    """Register a rule that distributes the sparsity over blocks, as the value `name` of `--sparsity.allocation`.

    The rule is called as `function(scores, statistics, blocks, budget, **options)`. It returns margins, of which the
    smallest are removed until the budget is met, or `models.masks.Masks` that meet the budget.

    - scores: `importance.scores.Scores`, float64, per block: ffn, (N,) for neurons; attention, (G,) for KV groups.
    - statistics: `calibration.statistics.CorpusStatistics` of the scoring corpus.
    - blocks: `models.blocks.Block` of the dense model; budget: `sparsity.budget.Budget`.
    - options: numbers from `--sparsity.options.OPTION`; the rule has them as keyword-only parameters.
    - margins: a pair of lists with the shapes of scores.ffn and scores.attention; any float dtype, finite.

    Example:

        from gprune import allocation

        @allocation("powers")
        def powers(scores, statistics, blocks, budget, *, power=2.0):
            return [s**power for s in scores.ffn], [s**power for s in scores.attention]

    Args:
        name: the value of `--sparsity.allocation`.
        modules: whether the rule is instead a `function(masks, ranks)` that returns thresholds of modules, from the
            masks of `--sparsity.start`.
        learned: whether thresholds are learned, starting from the returned ones.
        whole_blocks: whether the rule removes whole blocks; then there are no modules.
        errors: whether the rule reads `statistics.errors`, which are measured by a forward and backward pass over a
            few tokens.
    """

    def decorate(function: Rule) -> Rule:
        ALLOCATION.register(name)(function)
        function.modules, function.learned, function.whole_blocks = modules, learned, whole_blocks
        function.errors = errors
        return function

    return decorate


def allocate(
    name: str, scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget, **options: float
) -> Masks:
    """Return keep masks by the rule `name`. The rule is called with copies of scores and statistics.

    Raises:
        UserError: if margins have other shapes than the scores, or are not dense, real and finite; if masks miss the
            budget.
    """
    from gprune.models.masks import Masks
    from gprune.sparsity.cut import keep_masks
    from gprune.sparsity.returned import checked_masks, checked_pair

    rule = ALLOCATION[name]
    with ALLOCATION.running(name):
        result = rule(copy.deepcopy(scores), statistics.copied(), blocks, budget, **options)
    if isinstance(result, Masks):
        return checked_masks(ALLOCATION, name, result, budget, exact=not rule.whole_blocks)
    sizes = [[len(s) for s in kind] for kind in (scores.ffn, scores.attention)]
    return keep_masks(budget, *checked_pair(ALLOCATION, name, "Masks, or margins", result, sizes))


def module_thresholds(name: str, masks: Masks, ranks: ModuleRanks) -> Thresholds:
    """Return thresholds by the rule for modules `name`, called with copies; UserError unless they are finite."""
    from gprune.sparsity.returned import checked_pair

    with ALLOCATION.running(name):
        result = ALLOCATION[name](*copy.deepcopy((masks, ranks)))
    return checked_pair(ALLOCATION, name, "thresholds", result, [ranks.modules, [1] * len(ranks.attention)])


def removed_in_words(share: float, scope: str, rule: str, digits: int = 2) -> str:
    """Format a share as '50.00% of ffn', or as 'as many parameters as ...' for a rule that removes whole blocks."""
    removed = f"{share:.{digits}%} of {scope}"
    return f"as many parameters as {removed}" if rule in ALLOCATION and ALLOCATION[rule].whole_blocks else removed


@allocation("learned", modules=True, learned=True)
def learned(masks: Masks, ranks: ModuleRanks) -> Thresholds:
    """One threshold per module, learned with frozen weights, starting from the masks of `--sparsity.start`."""
    from gprune.sparsity.thresholds import start_thresholds

    return start_thresholds(masks, ranks)


@allocation("equal", modules=True)
def equal(masks: Masks, ranks: ModuleRanks) -> Thresholds:
    """The same threshold for all modules, so that each module loses the same fraction, independently of the masks."""
    import torch

    zeros = functools.partial(torch.zeros, dtype=torch.float64)
    return [zeros(k) for k in ranks.modules], [zeros(1) for _ in ranks.attention]


@allocation("uniform")
def uniform(scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget) -> Margins:
    """m_i = r_i, the rank inside the block in (0, 1): every block loses the same fraction."""
    return _ranks(scores, blocks)


def _ranks(scores: Scores, blocks: Sequence[Block]) -> Margins:
    """Return ranks in (0, 1): of every neuron in its block or expert, and of every KV group in its block."""
    from gprune.importance.scores import fractional_ranks

    pairs = zip(scores.ffn, blocks, strict=True)
    ffn = [fractional_ranks(s, groups=b.experts, ties="ordinal") for s, b in pairs]
    return ffn, [fractional_ranks(s, ties="ordinal") for s in scores.attention]


@allocation("global")
def standardised(scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget) -> Margins:
    """m_i = (s_i - mean s) / std s per block, with one threshold for all: FLAP's adaptive search (arXiv 2312.11983).

    As in the authors' repository, attention channels are standardised first and then averaged over each KV group.
    Constant scores have margin 0. The authors count a head as 512/3 neurons, which is correct for LLaMA's shapes; our
    budget counts parameters.
    """

    def z(s: Tensor) -> Tensor:
        std = s.std(correction=0)
        # due to rounding, equal numbers can have a standard deviation above 0
        return (s - s.mean()) / std if std > 0 and s.min() < s.max() else s.new_zeros(s.shape)

    pairs = zip(scores.channels, scores.attention, strict=True)
    groups = [z(c).view(len(g), -1).mean(1) if len(g) else g for c, g in pairs]
    return [z(s) for s in scores.ffn], groups


@allocation("owl")
def outlier_weighted(
    scores: Scores,
    statistics: CorpusStatistics,
    blocks: Sequence[Block],
    budget: Budget,
    *,
    multiple: AtLeast1Float = 5.0,
    spread: NonNegative = 0.08,
) -> Margins:
    """m_i = r_i - S_b: block b loses the fraction S_b, which is lower with more outliers (OWL, arXiv 2310.05175).

    D_b is the share of elements A_ij = |W_ij| ||X_j||_2 that exceed `multiple` x mean A (M in the paper). D_b is scaled
    to [0, 2 `spread`] (lambda in the paper) and centred, and S_b = sparsity - D_b. So S_b averages to the sparsity. The
    defaults of M and lambda are the authors' for LLaMA. A is computed from the projection that loses columns: down for
    neurons, output for KV groups. The paper removes single weights and computes A from all linear layers.
    """

    import torch

    def sparsities(kind: str, part: str) -> Tensor:
        """Return S_b per block, (L,) float64, from inputs of `down` (kind `ffn`) or `output` (`attention`)."""
        D = torch.zeros(len(blocks), dtype=torch.float64)
        stay = [b for b in budget.costs.stay if part in blocks[b].parts]
        for block, channel in zip(blocks, getattr(statistics, kind), strict=True):
            if part in block.parts:
                A = block.parts[part].weight.detach().float().cpu().abs() * channel.total.mean_sq.sqrt().float()
                D[block.index] = (multiple * A.mean() < A).double().mean()
        low, high = D[stay].aminmax() if stay else (0.0, 0.0)
        D = (D - low) / (high - low) * 2 * spread if high > low else torch.zeros_like(D)
        return budget.sparsity - (D - D[stay].mean())

    parts = zip(_ranks(scores, blocks), (sparsities("ffn", "down"), sparsities("attention", "output")), strict=True)
    ffn, attention = ([r - S for r, S in zip(ranks, by_block, strict=True)] for ranks, by_block in parts)
    return ffn, attention


@allocation("reconstruction", errors=True)
def reconstruction(
    scores: Scores,
    statistics: CorpusStatistics,
    blocks: Sequence[Block],
    budget: Budget,
    *,
    strength: NonNegative = 0.75,
) -> Margins:
    """m_i = r_i - S_b: block b loses the fraction S_b, chosen to minimise the estimated rise of the loss.

    `statistics.errors` estimates how much the loss rises if a block is cut to a few widths (`calibration.errors`). The
    lower convex hull of these points gives every neuron a price: the rise of the loss divided by the neuron's cost in
    the budget. Removing the cheapest neurons of the whole model would remove the fraction S*_b of block b. As the
    estimate is only accurate near the dense model, S_b = S + `strength` (S*_b - S), with S the sparsity. With strength
    1 the first blocks of a model would lose nothing. KV groups are allocated as by `uniform`. The estimate assumes
    least squares, whatever the recovery. This rule is ours; the strength was chosen on development text of SmolLM2.
    """
    import torch

    errors, rest = statistics.errors, budget.rest
    costs = {b: budget.costs.prices.neurons[b] for b in budget.costs.stay}
    costs = {b: (table[-1] - table[0]) / max(1, budget.costs.neurons[b]) for b, table in costs.items()}
    all_neurons = sum(cost * budget.costs.neurons[b] for b, cost in costs.items())
    costs = {b: cost for b, cost in costs.items() if cost and b not in budget.costs.protected}
    prices = {b: _prices(errors[b], budget.costs.neurons[b]) / cost for b, cost in costs.items()}
    ffn, attention = _ranks(scores, blocks)
    # Of neurons and KV groups in blocks that are not removed, including protected ones.
    share = rest.target / rest.costs.total
    shares = [share] * len(blocks)
    if prices:
        joined = torch.cat(list(prices.values()))
        cost = torch.cat([torch.full((len(of),), costs[b], dtype=torch.float64) for b, of in prices.items()])
        order = joined.argsort(stable=True)
        goes = torch.zeros(len(joined), dtype=torch.bool)
        goes[order] = cost[order].cumsum(0) - cost[order] / 2 < share * all_neurons
        mean = min(1.0, share * all_neurons / float(cost.sum()))
        for b, of in zip(prices, goes.split([len(of) for of in prices.values()]), strict=True):
            shares[b] = mean + strength * (float(of.double().mean()) - mean)
    return [r - S for r, S in zip(ffn, shares, strict=True)], [r - share for r in attention]


def _prices(errors: Tensor, neurons: int) -> Tensor:
    """Return how much removing each neuron adds to the error, (N,) float64, in order of removal.

    Args:
        errors: E(K) at equally spaced widths K from 0 to all neurons; the lower convex hull of them is used.
    """
    import numpy
    import torch
    from scipy.optimize import isotonic_regression

    steps = isotonic_regression((errors[:-1] - errors[1:]).numpy(), increasing=False).x  # slopes of the hull
    # Interpolate log prices between the middles of steps, so that neurons of a block have different prices.
    middles = (numpy.arange(len(steps)) + 0.5) / len(steps)
    places = (numpy.arange(neurons) + 0.5) / neurons
    logs = numpy.interp(places, middles, numpy.log(numpy.maximum(steps, 1e-300)))
    return torch.from_numpy(numpy.exp(logs)).flip(0)


@allocation("depth", whole_blocks=True)
def depth(scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget) -> Masks:
    """Remove whole blocks, least influential first: ShortGPT (arXiv 2403.03853), BI_b = 1 - E cos(x_b, x_b+1).

    Blocks are removed until the next one would exceed the target. The next block only loses its lowest-scoring neurons,
    so that the baseline removes as many parameters as other methods. If its FFN is too small for that, the block is
    removed too. A removed block includes attention and norms, whatever the scope. A width that changes becomes a
    multiple of the budget's `width_multiple`. `pipeline.plan` rejects targets that would leave no block.
    """
    import torch

    from gprune.models.masks import Masks
    from gprune.sparsity.cut import top_of_experts

    masks = Masks([torch.ones(b.experts * b.neurons, dtype=torch.bool) for b in blocks],
                  [torch.ones(b.kv_groups, dtype=torch.bool) for b in blocks])  # fmt: skip
    left, prices = budget.target, budget.costs.prices
    own_layer = {b: own for own in budget.costs.by_layer for b in own}  # all blocks of a layer have the same influence
    for layer in {own_layer[b][0]: own_layer[b] for b in statistics.influence.argsort(stable=True).tolist()}.values():
        if left <= 0 or not budget.costs.protected.isdisjoint(layer):
            continue
        index = max(layer, key=lambda b: prices.neurons[b][-1])  # the block with the largest FFN
        block, whole = blocks[index], sum(prices.blocks[b] for b in layer)
        table, grid = prices.neurons[index], range(0, block.neurons, budget.width_multiple)
        kept = max((width for width in grid if table[-1] - table[width] >= left), default=0)
        if left >= whole or kept == 0:
            for b in layer:
                masks.ffn[b][:] = False
                masks.attention[b][:] = False
            left -= whole
        else:
            masks.ffn[index] = top_of_experts(scores.ffn[index], kept, experts=block.experts)
            break
    return masks
