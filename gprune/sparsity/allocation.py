"""Allocation rules: how sparse each block, or module, becomes; one function per rule.

A rule turns scores and statistics into a margin for every unit; the budget then removes the lowest margins over the
whole model, to the parameter. A rule may return keep masks in place of margins (`depth`). A rule for modules
(`learned`, `equal`) turns such masks and the ranks inside modules into a threshold for each module.

    @allocation("mine")
    def mine(scores, statistics, blocks, budget, *, power=1.0):      # --sparsity.options.power 2
        return [s**power for s in scores.ffn], scores.attention      # scores compared across blocks
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gprune.checks import AtLeast1Float, NonNegative
from gprune.registry import Registry

if TYPE_CHECKING:  # flags are checked by what is registered here, which should not wait for PyTorch
    from torch import Tensor

    from gprune.calibration.statistics import CorpusStatistics
    from gprune.importance.scores import Scores
    from gprune.models.blocks import Block
    from gprune.models.masks import Masks
    from gprune.partition.modules import ModuleRanks
    from gprune.sparsity.budget import Budget
    from gprune.sparsity.thresholds import Thresholds

Margins = tuple[list["Tensor"], list["Tensor"]]  # neurons (N,), KV groups (G,) per block, float64; smallest goes first
Rule = Callable[..., Any]
ALLOCATION: Registry[Rule] = Registry("allocation")


def allocation(
    name: str, *, modules: bool = False, learned: bool = False, whole_blocks: bool = False, errors: bool = False
) -> Callable[[Rule], Rule]:
    """Register a rule that spreads the sparsity over blocks, as the value `name` of `--sparsity.allocation`.

    It is called as `function(scores, statistics, blocks, budget, **options)`, and returns margins, of which the
    smallest are removed until the budget is met, or `models.masks.Masks` that meet it.

    - scores: `importance.scores.Scores`, float64: ffn, (N,) of each block's neurons; attention, (G,) of its KV groups.
    - statistics: `calibration.statistics.CorpusStatistics` of the scoring corpus.
    - blocks: `models.blocks.Block` of the dense model; budget: `sparsity.budget.Budget`.
    - options: keyword-only parameters, numbers that `--sparsity.options.OPTION` sets.
    - margins: a pair of lists, as scores.ffn and scores.attention, of any float dtype, finite.

    Example:

        from gprune import allocation

        @allocation("powers")
        def powers(scores, statistics, blocks, budget, *, power=2.0):
            return [s**power for s in scores.ffn], [s**power for s in scores.attention]

    Args:
        name: the value of `--sparsity.allocation`.
        modules: the rule is a `function(masks, ranks)` that returns thresholds of modules, given the masks of
            `--sparsity.start`.
        learned: learning starts at these thresholds.
        whole_blocks: the rule removes whole blocks, and there are no modules.
        errors: the rule reads `statistics.errors`, which a pass forward and backward measures on a little text.
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
    """Keep masks by the rule `name`, which gets copies of scores and statistics.

    Raises:
        UserError: for margins that are not shaped as the scores, dense, real and finite, and for masks off budget.
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
    """Thresholds by the rule for modules `name`, which gets copies; a UserError unless they are finite numbers."""
    from gprune.sparsity.returned import checked_pair

    with ALLOCATION.running(name):
        result = ALLOCATION[name](*copy.deepcopy((masks, ranks)))
    return checked_pair(ALLOCATION, name, "thresholds", result, [ranks.modules, [1] * len(ranks.attention)])


def removed_in_words(share: float, scope: str, rule: str, digits: int = 2) -> str:
    """'50.00% of ffn'; where a rule removes whole blocks, attention and norms too, what that is as much as."""
    removed = f"{share:.{digits}%} of {scope}"
    return f"as many parameters as {removed}" if rule in ALLOCATION and ALLOCATION[rule].whole_blocks else removed


@allocation("learned", modules=True, learned=True)
def learned(masks: Masks, ranks: ModuleRanks) -> Thresholds:
    """One threshold per module, trained around the frozen model; learning starts at the masks of `--sparsity.start`."""
    from gprune.sparsity.thresholds import start_thresholds

    return start_thresholds(masks, ranks)


@allocation("equal", modules=True)
def equal(masks: Masks, ranks: ModuleRanks) -> Thresholds:
    """The same threshold for all modules, which then lose the same fraction each, whatever the masks keep of them."""
    import torch

    zeros = functools.partial(torch.zeros, dtype=torch.float64)
    return [zeros(k) for k in ranks.modules], [zeros(1) for _ in ranks.attention]


@allocation("uniform")
def uniform(scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget) -> Margins:
    """m_i = r_i, the rank inside the block in (0, 1): every block loses the same fraction."""
    return _ranks(scores, blocks)


def _ranks(scores: Scores, blocks: Sequence[Block]) -> Margins:
    """The rank of every neuron inside its block or expert, and of every KV group inside its block, in (0, 1)."""
    from gprune.importance.scores import fractional_ranks

    pairs = zip(scores.ffn, blocks, strict=True)
    ffn = [fractional_ranks(s, groups=b.experts, ties="ordinal") for s, b in pairs]
    return ffn, [fractional_ranks(s, ties="ordinal") for s in scores.attention]


@allocation("global")
def standardised(scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget) -> Margins:
    """m_i = (s_i - mean s) / std s inside the block, then one threshold: FLAP's adaptive search (arXiv 2312.11983).

    As in the authors' repository, attention channels are standardised before each KV group averages its channels.
    Constant scores have margin 0. The repository counts a head as 512/3 neurons, which is right for LLaMA's shapes; our
    budget counts parameters.
    """

    def z(s: Tensor) -> Tensor:
        std = s.std(correction=0)
        # by rounding, equal numbers can have a standard deviation above 0
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
    """m_i = r_i - S_b: block b loses the fraction S_b, less where it has more outliers (OWL, arXiv 2310.05175).

    D_b = share of the elements A_ij = |W_ij| ||X_j||_2 that exceed `multiple` x mean A (the paper's M). S_b is the
    sparsity minus D_b, scaled to [0, 2 `spread`] and centred: it averages to the sparsity and spans 2 `spread` (the
    paper's lambda). The defaults of M and lambda are the authors' for LLaMA. A comes from the projection whose units go
    (down for neurons, output for KV groups); the paper, which removes single weights, takes all linear layers.
    """

    import torch

    def sparsities(kind: str, part: str) -> Tensor:
        """S_b of each block, (L,) float64, by what enters `down` (kind `ffn`) or `output` (`attention`)."""
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
    """m_i = r_i - S_b: block b loses the fraction S_b whose error costs the loss least, on one scale for all blocks.

    `statistics.errors` estimates what each block's error costs at a few widths (`calibration.errors`). On the lower
    convex hull of these points every neuron has a price, what its error adds by what it costs in the budget; neurons
    go in the order of prices over the whole model. So block b would lose the fraction S*_b. S_b = S + `strength`
    (S*_b - S), S the sparsity, since the estimate holds near the dense model alone: at a strength of 1 blocks early in
    the model lose nothing. KV groups go as by `uniform`. Behind other recoveries than least squares, or none, the
    estimate is the same. Our own; the strength was chosen on development text of SmolLM2.
    """
    import torch

    errors, rest = statistics.errors, budget.rest
    costs = {b: budget.costs.prices.neurons[b] for b in budget.costs.stay}
    costs = {b: (table[-1] - table[0]) / max(1, budget.costs.neurons[b]) for b, table in costs.items()}
    all_neurons = sum(cost * budget.costs.neurons[b] for b, cost in costs.items())
    costs = {b: cost for b, cost in costs.items() if cost and b not in budget.costs.protected}
    prices = {b: _prices(errors[b], budget.costs.neurons[b]) / cost for b, cost in costs.items()}
    ffn, attention = _ranks(scores, blocks)
    share = rest.target / rest.costs.total  # of neurons and KV groups of blocks that stay, protected ones included
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
    """What each neuron adds to the error when it goes, (N,) float64, the first one to go first.

    Args:
        errors: at equally spaced widths from no neuron to all of them; their lower convex hull is taken.
    """
    import numpy
    import torch
    from scipy.optimize import isotonic_regression

    steps = isotonic_regression((errors[:-1] - errors[1:]).numpy(), increasing=False).x  # the slopes of the hull
    # Between the middles of two steps log prices change linearly, so that neurons of a block have different prices.
    middles = (numpy.arange(len(steps)) + 0.5) / len(steps)
    places = (numpy.arange(neurons) + 0.5) / neurons
    logs = numpy.interp(places, middles, numpy.log(numpy.maximum(steps, 1e-300)))
    return torch.from_numpy(numpy.exp(logs)).flip(0)


@allocation("depth", whole_blocks=True)
def depth(scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget) -> Masks:
    """Whole blocks go, the least influential first: ShortGPT (arXiv 2403.03853), BI_b = 1 - E cos(x_b, x_b+1).

    Blocks go until the next one would remove more than the target. That block stays, but loses its neurons of lowest
    score until the target is met, so that the baseline removes as many parameters as other methods; if its FFN is not
    enough, it goes too, attention and norms included. Attention goes with its block whatever the scope. A width that
    changes ends up on a multiple of the budget's. `pipeline.plan` refuses targets that would leave no block.
    """
    import torch

    from gprune.models.masks import Masks
    from gprune.sparsity.cut import top_of_experts

    masks = Masks([torch.ones(b.experts * b.neurons, dtype=torch.bool) for b in blocks],
                  [torch.ones(b.kv_groups, dtype=torch.bool) for b in blocks])  # fmt: skip
    left, prices = budget.target, budget.costs.prices
    own_layer = {b: own for own in budget.costs.by_layer for b in own}  # its blocks turn hidden states alike
    for layer in {own_layer[b][0]: own_layer[b] for b in statistics.influence.argsort(stable=True).tolist()}.values():
        if left <= 0 or not budget.costs.protected.isdisjoint(layer):
            continue
        index = max(layer, key=lambda b: prices.neurons[b][-1])  # whose FFN is the largest
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
