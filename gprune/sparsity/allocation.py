"""Allocation rules, one function each: they determine the sparsity of every block or module.

A rule computes a margin for every unit from scores and statistics. Units with the lowest margins in the whole model are
then removed until the budget is met. A rule may return keep masks instead of margins. Rules for modules
(`learned`, `equal`) compute a threshold for each module from such masks and the ranks inside modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gprune.checks import AtLeast1Float, NonNegative
from gprune.errors import UserError
from gprune.registry import Registry, UserCode

if TYPE_CHECKING:  # this registry is imported to check flags, which should not wait for PyTorch
    from torch import Tensor, nn

    from gprune.calibration.statistics import CorpusStatistics
    from gprune.importance.scores import Scores
    from gprune.models.masks import Masks
    from gprune.partition.modules import ModuleRanks
    from gprune.sparsity.budget import Budget
    from gprune.sparsity.thresholds import Thresholds
    from gprune.units.structure import Units

Margins = Mapping[str, "Tensor"]  # (N,) by key of units, floats; the smallest is removed first
Rule = Callable[..., Any]
ALLOCATION: Registry[Rule] = Registry("allocation")


def allocation(
    name: str, *, modules: bool = False, learned: bool = False, errors: bool = False
) -> Callable[[Rule], Rule]:
    """Register a rule that distributes the sparsity over blocks, as the value `name` of `--sparsity.allocation`.

    The rule is called as `function(scores, statistics, layers, budget, **options)`. It returns margins, of which the
    smallest are removed until the budget is met, or `models.masks.Masks` that meet the budget.

    - scores: `importance.scores.Scores`, float64 by key of units, such as (N,) for the neurons `neurons.0`.
    - statistics: `calibration.statistics.CorpusStatistics` of the scoring corpus.
    - layers: the decoder layers of the dense model.
    - budget: `sparsity.budget.Budget`, with `units`.
    - options: numbers and bools from `--sparsity.options.OPTION`; the rule has them as keyword-only parameters. They
      have the type of the parameter's annotation, such as int or bool; without one, float.
    - margins: by key of units, with the shapes of the scores; any float dtype, finite.

    Example:

        from gprune import allocation

        @allocation("powers")
        def powers(scores, statistics, layers, budget, *, power=2.0):
            return {key: s**power for key, s in scores.items()}

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
        function.needs = frozenset({"gram", "errors"} if errors else ())
        return function

    return decorate


def allocate(
    name: str,
    scores: Scores,
    statistics: CorpusStatistics,
    layers: Sequence[nn.Module],
    budget: Budget,
    **options: float,
) -> Masks:
    """Return keep masks by the rule `name`. The rule is called with copies of scores and statistics."""
    from gprune.models.masks import Masks
    from gprune.sparsity.cut import keep_masks

    rule = ALLOCATION[name]
    result = rule(copy.deepcopy(scores), statistics.copy(), layers, budget, **options)
    if isinstance(result, Masks):
        return checked_masks(ALLOCATION, name, result, budget)
    sizes = {u.key: u.size for u in budget.units if u.kind in budget.finer}
    return keep_masks(budget, checked_units(ALLOCATION, name, "Masks, or margins", result, sizes))


def module_thresholds(name: str, masks: Masks, ranks: ModuleRanks) -> Thresholds:
    """Return thresholds by the rule `name` for modules. The rule is called with copies of masks and ranks.

    If `name` is a rule for blocks, thresholds follow from the masks as at the start of learning.
    """
    if not ALLOCATION[name].modules:
        name = "learned"
    result = ALLOCATION[name](*copy.deepcopy((masks, ranks)))
    return checked_units(ALLOCATION, name, "thresholds", result, ranks.modules)


def checked_masks(registry: UserCode, name: str, value: Any, budget: Budget) -> Masks:
    """Check that a registered function or stage has returned masks that fit a budget's units and meet it.

    They must exceed the budget by less than one step.
    """
    from gprune.models.masks import Masks

    entry = f"{registry.kind.capitalize()} '{name}'"
    if not isinstance(value, Masks):
        raise UserError(f"{entry} must return Masks; got {type(value).__name__}.")
    sizes = {u.key: u.size for u in budget.units if u.kind in ("neurons", "kv_groups", *budget.finer)}
    masks = Masks(checked_units(registry, name, "masks", value, sizes, "bool"))
    step = budget.largest_step
    removed = budget.removed_by(masks)
    target = budget.target
    if not target <= removed < target + step:
        needed = f"100 % to less than {1 + step / target:.2%} of the target"
        raise UserError(f"{entry} must return masks on budget, which remove {needed}; got {removed / target:.2%}.")
    return masks


def checked_units(
    registry: UserCode, name: str, what: str, value: Any, sizes: Mapping[str, int], of: str = "finite numbers"
) -> dict[str, Tensor]:
    """Check that a value has a tensor for each key of `sizes`, with this length, and return these on the CPU.

    Errors call it `what`; the content is `of`, see `UserCode.checked`.
    """
    if not isinstance(value, Mapping) or not value.keys() >= sizes.keys():
        missing = next((key for key in sizes if isinstance(value, Mapping) and key not in value), "")
        received = f"none for '{missing}'" if missing else type(value).__name__
        raise UserError(
            f"{registry.kind.capitalize()} '{name}' must return {what} as a dictionary with a tensor for each of "
            f"{len(sizes)} keys of units, such as '{next(iter(sizes))}'; got {received}."
        )
    return {
        key: registry.checked(name, f"{what} of '{key}'", value[key], (size,), of=of).cpu()
        for key, size in sizes.items()
    }


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

    return {key: torch.zeros(modules, dtype=torch.float64) for key, modules in ranks.modules.items()}


@allocation("uniform")
def uniform(scores: Scores, statistics: CorpusStatistics, layers: Sequence[nn.Module], budget: Budget) -> Margins:
    """m_i = r_i, the rank inside the block in (0, 1): every block loses the same fraction."""
    return _ranks(scores, budget)


def _ranks(scores: Scores, budget: Budget) -> dict[str, Tensor]:
    """Return ranks in (0, 1) of all units, of each expert separately."""
    from gprune.importance.scores import unit_ranks

    return {u.key: unit_ranks(u, scores[u.key], ties="ordinal") for u in budget.units if u.key in scores}


@allocation("global")
def standardised(scores: Scores, statistics: CorpusStatistics, layers: Sequence[nn.Module], budget: Budget) -> Margins:
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

    margins = {}
    for key, s in scores.items():
        channels = standardise(scores.channels.get(key, s))
        margins[key] = channels.view(len(s), -1).mean(1) if key in scores.channels else channels
    return margins


@allocation("owl")
def outlier_weighted(
    scores: Scores,
    statistics: CorpusStatistics,
    layers: Sequence[nn.Module],
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

    from gprune.models.units import output_weight

    def outlier_share(u: Units) -> Tensor:
        """Return D_b before it is scaled, from the weight that reads units and the statistics of its inputs."""
        A = output_weight(u, layers[u.layer]).abs() * statistics.channels[u.key].total.mean_sq.sqrt().float()
        return (multiple * A.mean() < A).double().mean()

    margins = _ranks(scores, budget)
    for kind in budget.finer:
        units = [u for u in budget.kept(kind) if u.reads]
        outlier_shares = torch.tensor([outlier_share(u) for u in units], dtype=torch.float64)
        low, high = outlier_shares.aminmax() if units else (0.0, 0.0)
        D = torch.zeros_like(outlier_shares)
        if high > low:  # otherwise all blocks lose the same fraction
            D = (outlier_shares - low) / (high - low) * 2 * spread
        for u, S in zip(units, budget.sparsity - (D - D.mean()), strict=True):
            margins[u.key] = margins[u.key] - S
    return margins


@allocation("reconstruction", errors=True)
def reconstruction(
    scores: Scores,
    statistics: CorpusStatistics,
    layers: Sequence[nn.Module],
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

    units = budget.kept("neurons")
    # S, the sparsity of the blocks that are not removed as a whole, protected ones included.
    share = budget.rest.target / budget.rest.total
    cost = {u.key: (budget.price[u.key][-1] - budget.price[u.key][0]) / max(1, u.count) for u in units}  # of a neuron
    target = share * sum(cost[u.key] * u.count for u in units)  # cost of neurons to remove
    open_units = [u for u in units if cost[u.key] and not u.stays]
    # Key of the neurons of a block -> prices of its neurons, in order of removal.
    prices = {u.key: _error_per_neuron(statistics.errors[u.number], u.count) / cost[u.key] for u in open_units}

    ranks = _ranks(scores, budget)
    margins = {key: r - share for key, r in ranks.items()}
    if prices:
        all_prices = torch.cat(list(prices.values()))
        all_costs = torch.cat([torch.full((len(p),), cost[key], dtype=torch.float64) for key, p in prices.items()])
        order = all_prices.argsort(stable=True)
        removed = torch.zeros(len(all_prices), dtype=torch.bool)
        # The cheapest neurons, as long as at least half of the next one fits into the target.
        removed[order] = all_costs[order].cumsum(0) - all_costs[order] / 2 < target
        mean_share = min(1.0, target / float(all_costs.sum()))  # S, if only these blocks lose neurons
        by_block = removed.split([len(p) for p in prices.values()])
        for key, removed_neurons in zip(prices, by_block, strict=True):
            cheapest_share = float(removed_neurons.double().mean())  # S*_b
            margins[key] = ranks[key] - (mean_share + strength * (cheapest_share - mean_share))  # S_b
    return margins


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
