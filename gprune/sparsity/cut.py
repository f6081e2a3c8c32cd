"""Convert margins to keep masks that reach the budget, and exceed it by less than the cost of one step.

The *margin* of a unit is logit(p_i) - t_m: its rank inside its module, minus the module's threshold. Units of the whole
model are removed in order of margin, smallest first, until their cost reaches the target.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gprune.importance.scores import fractional_ranks
from gprune.models.blocks import Block
from gprune.models.masks import Masks
from gprune.sparsity.budget import Budget
from gprune.sparsity.price import cost_beyond
from gprune.units.structure import Units


def slot_margins(margin: Tensor, experts: int) -> Tensor:
    """Return the margins of slots, (E x N,) -> (N,). Slot j has the mean over experts of the j-th smallest margin."""
    if experts == 1:
        return margin
    return margin.view(experts, -1).sort(1).values.mean(0)


def keep_top(margins: Tensor, kept: int | Tensor) -> Tensor:
    """Return the keep mask, (..., N) bool, of the `kept` units of each row with the largest (margin, index)."""
    order = margins.detach().double().argsort(dim=-1, stable=True)
    units = order.shape[-1]
    keep_in_order = torch.arange(units, device=margins.device) >= units - kept
    return torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, keep_in_order.expand_as(order))


def keep_top_neurons(block: Block, margin: Tensor, kept: int | Tensor) -> Tensor:
    """Return the keep mask, (E x N,) bool, of the `kept` neurons with the largest margins in each expert of a block."""
    return keep_top(margin.view(block.experts, -1), kept).flatten()


class Segments:
    """Sort the units of each block by two sorts over all blocks, instead of one sort per block.

    Index tensors that depend only on shapes are computed once, so that sorting does not synchronise with the device.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device):
        self.sizes = list(sizes)
        self.starts = [sum(self.sizes[:b]) for b in range(len(self.sizes))]
        self.block = repeat_values(range(len(self.sizes)), self.sizes, device)
        self.place = torch.arange(sum(self.sizes), device=device) - repeat_values(self.starts, self.sizes, device)

    def sort(self, margins: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Sort the units of all blocks by block, and inside a block by (margin, index)."""
        joined = torch.cat([m.detach().double() for m in margins])
        order = joined.argsort(stable=True)
        order = order[self.block[order].argsort(stable=True)]
        return joined[order], order


def repeat_values(values: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """Repeat `values[i]` `counts[i]` times, int64. This is done on the CPU to avoid synchronising with a GPU."""
    value_tensor = torch.tensor(list(values), dtype=torch.long)
    count_tensor = torch.tensor(list(counts), dtype=torch.long)
    return value_tensor.repeat_interleave(count_tensor).to(device, non_blocking=True)


def _select_until(keys: Tensor, cost: Tensor, target: int | Tensor) -> Tensor:
    """Select steps in order of (key, position) until their total cost reaches `target`: (steps,) bool."""
    order = keys.argsort(stable=True)
    cost_before = cost[order].cumsum(0) - cost[order]
    return torch.empty_like(keys, dtype=torch.bool).scatter_(0, order, cost_before < target)


class Steps:
    """The steps in which units of one kind are removed, with index tensors that are computed once per budget.

    Units are removed in order of (margin, index), `step` at a time. The first step makes the number a multiple of
    `step`, and the last `least` units are never removed. The key of a step is its largest margin, so a step is never
    removed before its last unit would be.
    """

    def __init__(self, units: Sequence[Units], budget: Budget, device: torch.device):
        self.units = units
        self.segments = Segments([u.count for u in units], device)
        # For each set of units: how many are removed after each step.
        removable = [(budget.number_of_removable(u), u.step) for u in units]
        after = [torch.arange(n % step or step, n + 1, step) if n else torch.arange(0) for n, step in removable]
        sizes = torch.cat([removed.diff(prepend=removed.new_zeros(1)) for removed in after])
        last = torch.cat([start + n - 1 for start, n in zip(self.segments.starts, after, strict=True)])
        costs = torch.cat([_step_costs(budget.price[u.key], n) for u, n in zip(units, after, strict=True)])
        self.total = int(costs.sum())  # cost of all steps
        # One entry per step, (steps,): number of units it removes, index of the last of them in the output of
        # `Segments.sort`, its cost, its set of units.
        self.size = sizes.to(device, non_blocking=True)
        self.last = last.to(device, non_blocking=True)
        self.cost = costs.to(device, non_blocking=True)
        self.owner = repeat_values(range(len(units)), [len(removed) for removed in after], device)

    def sort(self, margins: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the keys of steps, and the order of units; see `Segments.sort`."""
        slots = [slot_margins(m.detach().double(), u.rows) for m, u in zip(margins, self.units, strict=True)]
        margins, order = self.segments.sort(slots)
        return margins[self.last], order

    def choose(self, keys: Tensor, finer: Sequence[tuple[Tensor, Steps]], target: int | Tensor) -> Tensor:
        """Return which steps are removed, (steps,) bool, by their order with the (keys, steps) of finer kinds."""
        all_keys = torch.cat([keys, *(of_kind for of_kind, _ in finer)])
        all_costs = torch.cat([self.cost, *(steps.cost for _, steps in finer)])
        chosen = _select_until(all_keys, all_costs, target)[: len(keys)]
        if not finer:
            return chosen
        order = keys.argsort(stable=True)  # chosen steps come first
        cost_in_order = self.cost[order]
        cost_after = cost_in_order.cumsum(0)  # cost of each step and all steps before it
        cost_before = cost_after - cost_in_order
        # The last steps may exceed the target by much more than a finer one. Keep such units, last ones first, as long
        # as finer ones can be removed instead.
        exceeds = (cost_after > target) & (target - cost_before <= sum(steps.total for _, steps in finer))
        return torch.empty_like(chosen).scatter_(0, order, chosen[order] & ~exceeds)

    def removed(self, chosen: Tensor) -> Tensor:
        """Return how many of each set of units the chosen steps remove, int64.

        Steps of one set are removed in order: keys do not decrease, and ties are broken by position.
        """
        return self.size.new_zeros(len(self.units)).index_add_(0, self.owner, self.size * chosen)

    def masks(self, margins: Sequence[Tensor], order: Tensor, removed: Tensor) -> list[Tensor]:
        """Return keep masks from the order of units and the number of removed ones."""
        keep_in_order = self.segments.place >= removed[self.segments.block]
        masks = list(torch.empty_like(keep_in_order).scatter_(0, order, keep_in_order).split(self.segments.sizes))
        for i, u in enumerate(self.units):
            if u.rows > 1:  # each expert loses as many of its own
                masks[i] = keep_top(margins[i].view(u.rows, -1), u.count - removed[i]).flatten()
        return masks


def _step_costs(table: Sequence[int], removed_after_step: Tensor) -> Tensor:
    """Return the costs of steps, (steps,) int64, from the number of units that are removed after each."""
    remaining = torch.tensor([table[-1 - removed] for removed in [0, *removed_after_step.tolist()]])
    return remaining[:-1] - remaining[1:]


class Cut:
    """`keep_masks` for repeated calls with one budget, on the device of the margins and without synchronising.

    For example, two blocks with neurons of 3 parameters each, `width_multiple` 2, and 8 parameters to remove:

                            block 0                     block 1
        margins             0.9  0.1  0.5  0.2  0.7     0.3  0.8  0.4  0.6
        in order, in steps  0.1 | 0.2  0.5 | stay       0.3  0.4 | stay
        key (cost)          0.1 (3)   0.5 (6)           0.4 (6)

    The step with key 0.1 is removed first, then the one with key 0.4: 9 parameters, which is enough. Block 0 keeps
    neurons 0, 2, 3 and 4, and block 1 neurons 1 and 3.
    """

    def __init__(self, budget: Budget, device: torch.device):
        self.budget, self.rest, self.kept = budget, budget.rest, budget.kept
        # Kinds in scope without a share, from coarse to fine
        self.steps = {kind: Steps(self.rest.of_kind(kind), self.rest, device) for kind in self.rest.finer}

    def __call__(self, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor] | None = None) -> Masks:
        """Return masks from margins; see `keep_masks`."""
        margins = {"neurons": self.budget.of_kept_experts(neuron_margins), "kv_groups": group_margins}
        in_kept = self.cut({kind: [margins[kind][b] for b in self.kept] for kind in self.steps})

        def all_equal(u: Units, is_kept: bool) -> Tensor:
            """Return the mask of units that are all kept, or all removed."""
            return torch.full((u.rows * u.count,), is_kept, device=neuron_margins[0].device)

        masks = {}
        for kind in margins:
            of_kept = in_kept.get(kind) or [all_equal(u, True) for u in self.rest.of_kind(kind)]
            by_block = dict(zip(self.kept, of_kept, strict=True))
            masks[kind] = [
                by_block[b] if b in by_block else all_equal(u, False) for b, u in enumerate(self.budget.of_kind(kind))
            ]
        return Masks(self.budget.with_removed_experts(masks["neurons"]), masks["kv_groups"])

    def cut(self, margins: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        """Return keep masks from margins, in the order of the rest's units of each kind."""
        in_order = {kind: steps.sort(margins[kind]) for kind, steps in self.steps.items()}
        removed, target, kinds = {}, self.rest.target, list(self.steps)
        for place, (kind, steps) in enumerate(self.steps.items()):
            keys, finer = in_order[kind][0], kinds[place + 1 :]
            finer_steps = [(in_order[other][0], self.steps[other]) for other in finer]
            chosen = steps.choose(keys, finer_steps, target)
            removed[kind] = steps.removed(chosen)
            if finer:
                target = target - (steps.cost * chosen).sum()
        if self.rest.uniform:
            removed = equal_numbers(self.rest, removed)
        return {
            kind: steps.masks(margins[kind], in_order[kind][1], removed[kind]) for kind, steps in self.steps.items()
        }


def equal_numbers(budget: Budget, removed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return how many units of each kind all blocks lose if they keep equally many, the most that meet the target.

    Of kinds before the finest one each block keeps as many as blocks of different widths would keep on average
    (`removed` has how many these lose), and the finest kind makes up the rest.
    """
    *coarser, finest = budget.finer
    target, kept = budget.target, {}
    for kind in coarser:
        kept[kind] = _equal_number(budget, kind, removed[kind], finest, target)
        target -= _cost_beyond(budget, kind, kept[kind])
    kept[finest] = _widest(budget, finest, target)
    return {
        kind: removed[kind].new_tensor([max(0, u.count - number) for u in budget.of_kind(kind)])
        for kind, number in kept.items()
    }


def _cost_beyond(budget: Budget, kind: str, kept: int) -> int:
    """Return the removed cost if every block keeps this number of units of a kind."""
    return sum(cost_beyond(budget.price[u.key], kept) for u in budget.of_kind(kind))


def _widest(budget: Budget, kind: str, target: int) -> int:
    """Return the largest common number of units that removes at least the cost `target`; 0 if there is none."""
    units = budget.of_kind(kind)
    step, fewest, most = units[0].step, min(u.count for u in units if u.count), max(u.count for u in units)
    numbers = list(range(fewest // step * step, 0, -step))
    if fewest == most:
        numbers.insert(0, most)  # an unchanged width need not be a multiple of `step`
    # Costs rise along the descending numbers, so the first one that removes enough is the largest one.
    index = bisect_left(numbers, target, key=lambda kept: _cost_beyond(budget, kind, kept))
    return numbers[index] if index < len(numbers) else 0


def _equal_number(budget: Budget, kind: str, removed: Tensor, finest: str, target: int) -> int:
    """Return the number of units of a kind that every block keeps, from the numbers that blocks would lose."""
    counts = [u.count for u in budget.of_kind(kind) if u.count]  # of blocks with such units
    step = budget.of_kind(finest)[0].step
    kept = max(1, min(round((sum(counts) - int(removed.sum())) / len(counts)), min(counts)))

    def remaining(kept: int) -> int:
        """Return the cost that the finest kind has to make up if every block keeps `kept` units."""
        return target - _cost_beyond(budget, kind, kept)

    # Remove more if the finest kind cannot make up the rest.
    while kept > 1 and _widest(budget, finest, remaining(kept)) < step:
        kept -= 1
    # Keep units that exceed the target, as long as finer ones can be removed instead. Blocks of different widths lose
    # some in any case.
    smallest_cost = _cost_beyond(budget, finest, _widest(budget, finest, 0))
    largest_cost = _cost_beyond(budget, finest, step)
    while remaining(kept) < smallest_cost and kept < min(counts) and remaining(kept + 1) <= largest_cost:
        kept += 1
    return kept


def keep_masks(
    budget: Budget, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor] | None = None
) -> Masks:
    """Remove units in order of margin (ties by block, then index) until their cost reaches `budget.target`.

    With attention in scope, KV groups that come before the target in the common order of all units are removed first,
    and neurons make up the rest. So the overshoot is less than one step of `width_multiple` neurons, and no group is
    removed that exceeds the target by far. Each block keeps at least `width_multiple` neurons and one KV group.

    Blocks and experts that the budget removes as a whole keep nothing. Other units make up the rest of the target.
    Protected blocks keep everything. If all blocks must have the same widths, the overshoot is less than one step in
    every block.

    Margins are (N,) or (E x N,) per block for neurons, and (G,) for KV groups if attention is in scope. Widths of
    blocks that lose neurons are multiples of `width_multiple`.
    """
    return Cut(budget, neuron_margins[0].device)(neuron_margins, group_margins)


def uniform_masks(budget: Budget) -> Masks:
    """Return masks that meet a budget with equally sparse blocks and arbitrary units, to estimate sizes."""
    neurons, groups = (
        [fractional_ranks(torch.arange(u.count)).repeat(u.rows) for u in budget.of_kind(kind)]
        for kind in ("neurons", "kv_groups")
    )
    return keep_masks(budget, neurons, groups)


Removal = tuple[Tensor, Tensor]  # margins of units (or slots), and which of them are kept


def slots_of(budget: Budget, margins: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Removal]:
    """Return the margins of the neurons (or slots) of each block and which are kept, without removed experts."""
    rows = [u.rows - len(budget.lost.get(u.inside, ())) for u in budget.of_kind("neurons")]
    pairs = zip(budget.of_kept_experts(margins), budget.of_kept_experts(masks), rows, strict=True)
    # All experts keep the same number of neurons, and these have the largest margins.
    return [(slot_margins(m, e), keep if e == 1 else keep.view(e, -1).sort(1).values[0]) for m, keep, e in pairs]


def cut_margin(neurons: Sequence[Removal], groups: Sequence[Removal] = ()) -> Tensor:
    """Return the margin at which the budget cuts the common order of units, ().

    It is the largest margin among removed neurons (or slots). If no neuron is removed, because only KV groups cost
    something, it is the largest among removed KV groups; if none is removed either, 0.
    """
    largest = _largest_removed(neurons)
    if groups:
        largest = torch.where(largest == -torch.inf, _largest_removed(groups), largest)
    return largest.masked_fill(largest == -torch.inf, 0.0)


def _largest_removed(blocks: Sequence[Removal]) -> Tensor:
    """Return the largest margin among removed units, (); -inf if none is removed.

    A block that keeps nothing was removed as a whole, independently of its margins, and is ignored.
    """
    removed = [margin.masked_fill(keep | ~keep.any(), -torch.inf) for margin, keep in blocks]
    return torch.cat([*removed, removed[0].new_full((1,), -torch.inf)]).max()  # a model may have no units of a kind
