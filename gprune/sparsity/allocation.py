"""Allocation rules, one function each: they determine the sparsity of every block or module.

A rule computes a margin for every unit from scores and statistics. Units with the lowest margins in the whole model are
then removed until the budget is met. A rule may return keep masks instead of margins. Rules for modules
(`learned`, `equal`) compute a threshold for each module from such masks and the ranks inside modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gprune.checks import AtLeast1Float, NonNegative
from gprune.errors import UserError
from gprune.registry import Registry, UserCode

if TYPE_CHECKING:  # this registry is imported to check flags, which should not wait for PyTorch
    from torch import Tensor

    from gprune.calibration.statistics import ChannelStatistics, CorpusStatistics
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

LEARNING_FLAGS = (  # flags of threshold learning
    "corpora.learn", "corpora.learn_samples", "evaluation.curve", "sparsity.learn", "sparsity.loss", "sparsity.epochs",
    "sparsity.centred", "sparsity.learning_rate", "sparsity.offset_learning_rate",
    "sparsity.offset_limit",
)  # fmt: skip


def allocation(
    name: str, *, modules: bool = False, learned: bool = False, errors: bool = False
) -> Callable[[Rule], Rule]:
    """Register a rule that distributes the sparsity over blocks, as the value `name` of `--sparsity.allocation`.

    The rule is called as `function(scores, statistics, blocks, budget, **options)`. It returns margins, of which the
    smallest are removed until the budget is met, or `models.masks.Masks` that meet the budget.

    - scores: `importance.scores.Scores`, float64, per block: ffn, (N,) for neurons; attention, (G,) for KV groups.
    - statistics: `calibration.statistics.CorpusStatistics` of the scoring corpus.
    - blocks: `models.blocks.Block` of the dense model; budget: `sparsity.budget.Budget`.
    - options: numbers and bools from `--sparsity.options.OPTION`; the rule has them as keyword-only parameters. They
      have the type of the parameter's annotation, such as int or bool; without one, float.
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
        errors: whether the rule reads `statistics.errors`, which are measured by a forward and backward pass over a
            few tokens.

    Raises:
        ValueError: if another rule has this name.
        UserError: if the name has characters that are not allowed.
    """

    def decorate(function: Rule) -> Rule:
        """Register the rule in `ALLOCATION` with its properties, and return it."""
        ALLOCATION.register(name)(function)
        function.modules = modules
        function.learned = learned
        function.errors = errors
        function.reads = frozenset([*(["sparsity.start"] if modules else []), *(LEARNING_FLAGS if learned else [])])
        function.needs = frozenset({"gram", "errors"} if errors else ())
        return function

    return decorate


def allocate(
    name: str, scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget, **options: float
) -> Masks:
    """Return keep masks by the rule `name`. The rule is called with copies of scores and statistics."""
    from gprune.models.masks import Masks
    from gprune.sparsity.cut import keep_masks

    rule = ALLOCATION[name]
    result = rule(copy.deepcopy(scores), statistics.copy(), blocks, budget, **options)
    if isinstance(result, Masks):
        return checked_masks(ALLOCATION, name, result, budget)
    sizes = [len(s) for s in scores.ffn], [len(s) for s in scores.attention]
    neuron_margins, group_margins = checked_pair(ALLOCATION, name, "Masks, or margins", result, sizes)
    return keep_masks(budget, neuron_margins, group_margins)


def module_thresholds(name: str, masks: Masks, ranks: ModuleRanks) -> Thresholds:
    """Return thresholds by the rule `name` for modules. The rule is called with copies of masks and ranks.

    If `name` is a rule for blocks, thresholds follow from the masks as at the start of learning.
    """
    if not ALLOCATION[name].modules:
        name = "learned"
    result = ALLOCATION[name](*copy.deepcopy((masks, ranks)))
    sizes = ranks.modules, [1] * len(ranks.attention)
    return checked_pair(ALLOCATION, name, "thresholds", result, sizes)


def checked_masks(registry: UserCode, name: str, value: Any, budget: Budget) -> Masks:
    """Check that a registered function or stage has returned masks that fit a budget's units and meet it.

    They must exceed the budget by less than one step.
    """
    from gprune.models.masks import Masks

    entry = f"{registry.kind.capitalize()} '{name}'"
    if not isinstance(value, Masks):
        raise UserError(f"{entry} must return Masks; got {type(value).__name__}.")
    sizes = tuple([u.rows * u.count for u in budget.of_kind(kind)] for kind in ("neurons", "kv_groups"))
    masks = Masks(*checked_pair(registry, name, "masks", (value.ffn, value.attention), sizes, "bool"))
    step = budget.largest_step
    removed = budget.removed_by(masks)
    target = budget.target
    if not target <= removed < target + step:
        needed = f"100 % to less than {1 + step / target:.2%} of the target"
        raise UserError(f"{entry} must return masks on budget, which remove {needed}; got {removed / target:.2%}.")
    return masks


def checked_pair(
    registry: UserCode, name: str, what: str, value: Any, sizes: Sequence[Sequence[int]], of: str = "finite numbers"
) -> tuple[list[Tensor], list[Tensor]]:
    """Check that a value is (neurons, KV groups) with a tensor for each block, and return it on the CPU.

    Errors call it `what`. Tensors have the lengths `sizes` and the content `of`, see `UserCode.checked`.
    """

    def checked_kind(kind: str, tensors: Any, kind_sizes: Sequence[int]) -> list[Tensor]:
        """Check the tensors of all blocks for one kind of units."""
        pairs = zip(tensors, kind_sizes, strict=True)
        return [
            registry.checked(name, f"{what} of {kind} in block {b}", tensor, (size,), of=of).cpu()
            for b, (tensor, size) in enumerate(pairs)
        ]

    try:
        return tuple(checked_kind(*kind) for kind in zip(("neurons", "KV groups"), value, sizes, strict=True))
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # not lists, or lists of other lengths
        raise UserError(
            f"{registry.kind.capitalize()} '{name}' must return {what} as (neurons, KV groups), each a list with a "
            f"tensor for each of {len(sizes[0])} blocks; got {type(value).__name__}."
        ) from error


@allocation("learned", modules=True, learned=True)
def learned(masks: Masks, ranks: ModuleRanks) -> Thresholds:
    """One threshold per module, learned with frozen weights. Returns the start: the masks of `--sparsity.start`."""
    from gprune.sparsity.thresholds import start_thresholds

    return start_thresholds(masks, ranks)


@allocation("equal", modules=True)
def equal(masks: Masks, ranks: ModuleRanks) -> Thresholds:
    """The same threshold for all modules, so that each module loses the same fraction, independently of the masks.

    The common threshold is 0. Its value does not matter: units are removed in order of logit p_i - t until the budget
    is met, and adding a constant to all thresholds does not change this order. So the budget alone determines the
    fraction.
    """
    import torch

    neurons = [torch.zeros(modules, dtype=torch.float64) for modules in ranks.modules]
    groups = [torch.zeros(1, dtype=torch.float64) for _ in ranks.attention]
    return neurons, groups


@allocation("uniform")
def uniform(scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget) -> Margins:
    """m_i = r_i, the rank inside the block in (0, 1): every block loses the same fraction."""
    return _ranks(scores, blocks)


def _ranks(scores: Scores, blocks: Sequence[Block]) -> Margins:
    """Return ranks in (0, 1): of every neuron (`neuron_ranks`), and of every KV group in its block."""
    from gprune.importance.scores import fractional_ranks, neuron_ranks

    ffn = [neuron_ranks(b, s, ties="ordinal") for s, b in zip(scores.ffn, blocks, strict=True)]
    attention = [fractional_ranks(s, ties="ordinal") for s in scores.attention]
    return ffn, attention


@allocation("global")
def standardised(scores: Scores, statistics: CorpusStatistics, blocks: Sequence[Block], budget: Budget) -> Margins:
    """m_i = (s_i - mean s) / std s per block, with one threshold for all: FLAP's adaptive search (arXiv 2312.11983).

    As in the authors' repository, attention channels are standardised first and then averaged over each KV group.
    Constant scores have margin 0. The authors count a head as 512/3 neurons, which is correct for LLaMA's shapes; our
    budget counts parameters.
    """
    import torch

    def standardise(s: Tensor) -> Tensor:
        """Return scores of one block with mean 0 and standard deviation 1."""
        # Due to rounding, equal numbers can have a standard deviation above 0. A block may have no FFN.
        if not len(s) or s.min() == s.max():
            return torch.zeros_like(s)
        std = s.std(correction=0)
        return (s - s.mean()) / std if std > 0 else torch.zeros_like(s)

    ffn = [standardise(s) for s in scores.ffn]
    pairs = zip(scores.channels, scores.attention, strict=True)
    attention = [
        standardise(channels).view(len(groups), -1).mean(1) if len(groups) else groups for channels, groups in pairs
    ]
    return ffn, attention


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

    def sparsities(part: str, channels: Sequence[ChannelStatistics]) -> Tensor:
        """Return S_b per block, (L,) float64, from the weight of `part` and the statistics of its inputs."""
        outlier_shares = torch.zeros(len(blocks), dtype=torch.float64)
        remaining = [b for b in budget.kept if part in blocks[b].parts]
        for block, channel in zip(blocks, channels, strict=True):
            if part in block.parts:
                A = block.parts[part].weight.detach().float().cpu().abs() * channel.total.mean_sq.sqrt().float()
                outlier_shares[block.index] = (multiple * A.mean() < A).double().mean()
        low, high = outlier_shares[remaining].aminmax() if remaining else (0.0, 0.0)
        D = torch.zeros_like(outlier_shares)
        if high > low:  # otherwise all blocks lose the same fraction
            D = (outlier_shares - low) / (high - low) * 2 * spread
        return budget.sparsity - (D - D[remaining].mean())

    neuron_ranks, group_ranks = _ranks(scores, blocks)
    ffn = [r - S for r, S in zip(neuron_ranks, sparsities("down", statistics.ffn), strict=True)]
    attention = [r - S for r, S in zip(group_ranks, sparsities("output", statistics.attention), strict=True)]
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

    `statistics.errors` estimates how much the loss rises if a block is cut to a few widths
    (`calibration.block_errors`). The lower convex hull of these points gives every neuron a price: the rise of the loss
    divided by the neuron's cost in the budget. Removing the cheapest neurons of the whole model would remove the
    fraction S*_b of block b. As the estimate is only accurate near the dense model, S_b = S + `strength` (S*_b - S),
    with S the sparsity. With strength 1 the first blocks of a model would lose nothing. KV groups are allocated as by
    `uniform`. The estimate assumes least squares, whatever the recovery. This rule is ours; the strength was chosen on
    development text of SmolLM2."""
    import torch

    units = budget.of_kind("neurons")
    # S, the sparsity of the blocks that are not removed as a whole, protected ones included.
    share = budget.rest.target / budget.rest.total
    neuron_costs = {}  # index of a block -> average cost of a neuron
    for b in budget.kept:
        by_width = budget.price[units[b].key]
        neuron_costs[b] = (by_width[-1] - by_width[0]) / max(1, units[b].count)
    target = share * sum(cost * units[b].count for b, cost in neuron_costs.items())  # cost of neurons to remove
    open_costs = {b: cost for b, cost in neuron_costs.items() if cost and not units[b].stays}
    # Index of a block that is not protected -> prices of its neurons, in order of removal.
    prices = {b: _error_per_neuron(statistics.errors[b], units[b].count) / cost for b, cost in open_costs.items()}

    shares = [share] * len(blocks)  # S_b
    if prices:
        all_prices = torch.cat(list(prices.values()))
        all_costs = torch.cat([torch.full((len(p),), open_costs[b], dtype=torch.float64) for b, p in prices.items()])
        order = all_prices.argsort(stable=True)
        removed = torch.zeros(len(all_prices), dtype=torch.bool)
        # The cheapest neurons, as long as at least half of the next one fits into the target.
        removed[order] = all_costs[order].cumsum(0) - all_costs[order] / 2 < target
        mean_share = min(1.0, target / float(all_costs.sum()))  # S, if only these blocks lose neurons
        by_block = removed.split([len(p) for p in prices.values()])
        for b, removed_neurons in zip(prices, by_block, strict=True):
            cheapest_share = float(removed_neurons.double().mean())  # S*_b
            shares[b] = mean_share + strength * (cheapest_share - mean_share)
    neuron_ranks, group_ranks = _ranks(scores, blocks)
    ffn = [r - S for r, S in zip(neuron_ranks, shares, strict=True)]
    attention = [r - share for r in group_ranks]
    return ffn, attention


def _error_per_neuron(errors: Tensor, neurons: int) -> Tensor:
    """Return how much removing each neuron adds to the error, (N,) float64, in order of removal."""
    import numpy
    import torch
    from scipy.optimize import isotonic_regression

    # Slopes of the lower convex hull: the closest falling sequence to the differences of the errors.
    slopes = isotonic_regression((errors[:-1] - errors[1:]).numpy(), increasing=False).x
    # Interpolate log slopes between the middles of steps, so that neurons of a block have different prices. Slopes and
    # middles are in order of width, and the result is in order of removal.
    step_middles = (numpy.arange(len(slopes)) + 0.5) / len(slopes)
    neuron_middles = (numpy.arange(neurons) + 0.5) / neurons
    log_slopes = numpy.log(numpy.maximum(slopes, 1e-300))  # the logarithm of 0 is not finite
    logs = numpy.interp(neuron_middles, step_middles, log_slopes)
    return torch.from_numpy(numpy.exp(logs)).flip(0)
