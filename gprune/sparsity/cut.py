"""Convert margins to keep masks that meet the budget exactly.

The *margin* of a unit is logit(p_i) - t_m: its rank inside its module, minus the module's threshold. Units of the whole
model are removed in order of margin, smallest first, until their cost reaches the target.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gprune.importance.scores import fractional_ranks
from gprune.models.masks import Masks
from gprune.sparsity.budget import Budget


def slot_margins(margin: Tensor, experts: int) -> Tensor:
    """Return margins of slots, (E x N,) -> (N,): the mean over experts of each one's j-th smallest margin."""
    return margin if experts == 1 else margin.view(experts, -1).sort(1).values.mean(0)


def top_of_experts(margin: Tensor, kept: int | Tensor, *, experts: int = 1) -> Tensor:
    """Return the keep mask, (E x N,), of the `kept` neurons with the largest (margin, index) in each expert."""
    order = margin.detach().double().view(experts, -1).argsort(dim=1, stable=True)
    stays = torch.arange(order.shape[1], device=margin.device) >= order.shape[1] - kept
    return torch.empty_like(order, dtype=torch.bool).scatter_(1, order, stays.expand_as(order)).flatten()


class Segments:
    """Sort the units of each block by two sorts over all blocks, instead of one sort per block.

    Index tensors that depend only on shapes are computed once, so that sorting does not synchronise with the device.

    Args:
        sizes: number of units of each block.
        device: device of margins.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device):
        self.sizes = list(sizes)
        self.starts = [sum(self.sizes[:b]) for b in range(len(self.sizes))]
        self.block = repeated(range(len(self.sizes)), self.sizes, device)
        self.place = torch.arange(sum(self.sizes), device=device) - repeated(self.starts, self.sizes, device)

    def sort(self, margins: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return all margins, float64, and their units: by block, then by (margin, index)."""
        joined = torch.cat([m.detach().double() for m in margins])
        order = joined.argsort(stable=True)
        order = order[self.block[order].argsort(stable=True)]
        return joined[order], order


def repeated(values: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    """Repeat `values[i]` `sizes[i]` times, int64. This is done on the CPU to avoid synchronising with a GPU."""
    values, sizes = (torch.tensor(list(numbers), dtype=torch.long) for numbers in (values, sizes))
    return values.repeat_interleave(sizes).to(device, non_blocking=True)


def _take_until(keys: Tensor, cost: Tensor, target: int | Tensor) -> Tensor:
    """Select steps in order of (key, position) until their total cost reaches `target`: (S,) bool."""
    order = keys.argsort(stable=True)
    before = cost[order].cumsum(0) - cost[order]
    return torch.empty_like(keys, dtype=torch.bool).scatter_(0, order, before < target)


def _step_costs(table: Sequence[int], gone: Tensor) -> Tensor:
    """Return costs of a block's steps, int64, from its table of `Price` and the units removed after each step."""
    costs = torch.tensor([table[-1 - n] for n in [0, *gone.tolist()]])
    return costs[:-1] - costs[1:]


class Cut:
    """`keep_masks` for repeated calls with one budget, on the device of the margins and without synchronising.

    A block's neurons (or slots of experts) are removed in *steps*, in order of (margin, index). The key of a step is
    its largest margin, so a step is never removed before its last neuron would be. The first step makes the width a
    multiple of `width_multiple`. The last `width_multiple` neurons are never removed. Costs are whole numbers.

    For example, two blocks with neurons of 3 parameters each, `width_multiple` 2, and 8 parameters to remove:

                            block 0                     block 1
        margins             0.9  0.1  0.5  0.2  0.7     0.3  0.8  0.4  0.6
        in order, in steps  0.1 | 0.2  0.5 | stay       0.3  0.4 | stay
        key (cost)          0.1 (3)   0.5 (6)           0.4 (6)

    The step with key 0.1 is removed first, then the one with key 0.4: 9 parameters, which is enough. Block 0 keeps
    neurons 0, 2, 3 and 4, and block 1 neurons 1 and 3.
    """

    def __init__(self, budget: Budget, device: torch.device):
        self.costs, self.budget = budget.costs, (budget := budget.rest)
        costs, step = budget.costs, budget.width_multiple
        self.slots, self.groups = Segments(costs.neurons, device), Segments(costs.groups, device)
        removable = [0 if b in costs.protected else max(0, N - step) for b, N in enumerate(costs.neurons)]
        self.fillable = sum(t[-1] - t[-1 - n] for t, n in zip(costs.prices.neurons, removable, strict=True))
        # For each block: number of removed neurons after each step.
        gone = [torch.arange(n % step or step, n + 1, step) if n else torch.arange(0) for n in removable]
        steps = [len(g) for g in gone]
        sizes = torch.cat([g.diff(prepend=g.new_zeros(1)) for g in gone])
        cost = torch.cat([_step_costs(table, g) for table, g in zip(costs.prices.neurons, gone, strict=True)])
        ends = torch.cat([start + g - 1 for start, g in zip(self.slots.starts, gone, strict=True)])
        # For each step, (steps,): number of neurons, place of the last one in `Segments.sort`, cost, block.
        self.size, self.end, self.cost = (t.to(device, non_blocking=True) for t in (sizes, ends, cost))
        self.step_block = repeated(range(len(steps)), steps, device)
        # The best group is kept.
        removable = [0 if b in costs.protected else max(0, n - 1) for b, n in enumerate(costs.groups)]
        pairs = zip(self.groups.starts, removable, strict=True)
        ends = torch.cat([torch.arange(start, start + n) for start, n in pairs])
        self.group_end = ends.to(device, non_blocking=True)
        pairs = zip(costs.prices.groups, removable, strict=True)
        self.group_cost = torch.cat([_step_costs(table, torch.arange(1, n + 1)) for table, n in pairs]).to(device)

    def __call__(self, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor] | None = None) -> Masks:
        """Return masks from margins; see `keep_masks`."""
        stay = self.costs.stay
        of_stay = ([kind[b] for b in stay] if kind is not None else None for kind in (neuron_margins, group_margins))
        return self.costs.with_gone(self._masks(*of_stay))

    def _masks(self, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor] | None) -> Masks:
        """Return masks of blocks that are not removed as a whole, from their margins."""
        costs, target = self.budget.costs, self.budget.target
        if costs.uniform:
            return equal_widths(self.budget, neuron_margins, group_margins)
        slots = [slot_margins(m.detach().double(), e) for m, e in zip(neuron_margins, costs.of_experts, strict=True)]
        margins, order = self.slots.sort(slots)
        keys, groups = margins[self.end], torch.ones_like(self.groups.block, dtype=torch.bool)
        if costs.attention:
            assert group_margins is not None
            group_keys, group_order = self.groups.sort(group_margins)
            removed = self._groups(group_keys[self.group_end], keys)
            groups[group_order[self.group_end]] = ~removed
            target = target - (self.group_cost * removed).sum()
        taken = self.size * _take_until(keys, self.cost, target)
        # Steps of one block are removed in order: keys do not decrease, and ties are broken by position.
        gone = torch.zeros(len(slots), dtype=torch.long, device=keys.device).index_add_(0, self.step_block, taken)
        stays = self.slots.place >= gone[self.slots.block]
        ffn = list(torch.empty_like(stays).scatter_(0, order, stays).split(self.slots.sizes))
        for b, e in enumerate(costs.of_experts):
            if e > 1:
                ffn[b] = top_of_experts(neuron_margins[b], costs.neurons[b] - gone[b], experts=e)
        return Masks(ffn, list(groups.split(self.groups.sizes)))

    def _groups(self, group_keys: Tensor, keys: Tensor) -> Tensor:
        """Return which removable KV groups are removed, bool, by the common order of groups and steps of neurons."""
        target, count = self.budget.target, len(group_keys)
        taken = _take_until(torch.cat([group_keys, keys]), torch.cat([self.group_cost, self.cost]), target)[:count]
        order = group_keys.argsort(stable=True)  # removed groups come first
        cost = self.group_cost[order]
        gone = cost.cumsum(0)
        # The last groups may exceed the target by much more than a neuron. Keep such groups, last ones first, as long
        # as neurons can be removed instead.
        stays = (gone > target) & (target - (gone - cost) <= self.fillable)
        return torch.empty_like(taken).scatter_(0, order, taken[order] & ~stays)


def keep_masks(
    budget: Budget, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor] | None = None
) -> Masks:
    """Remove units in order of margin (ties by block, then index) until their cost reaches `budget.target`.

    With attention in scope, KV groups that come before the target in the common order of all units are removed first,
    and neurons make up the rest. So the overshoot is less than one step of `width_multiple` neurons, and no group is
    removed that exceeds the target by far. Each block keeps at least `width_multiple` neurons and one KV group.

    Blocks in `UnitCosts.removed_blocks` are removed as a whole, and units of other blocks make up the rest of the
    target. Protected blocks keep everything. If all blocks must have the same widths, see `equal_widths`; then the
    overshoot is less than one step in every block.

    Args:
        budget: costs of the units, the target and the grid of widths.
        neuron_margins: per block (N,) or (E x N,), any float dtype; smallest is removed first.
        group_margins: per block (G,); needed if attention is in scope.

    Returns:
        Masks that remove at least the target and less than one more step. Widths of blocks that lose neurons are
        multiples of `width_multiple`.
    """
    return Cut(budget, neuron_margins[0].device)(neuron_margins, group_margins)


def uniform_masks(budget: Budget) -> Masks:
    """Return masks that meet a budget with equally sparse blocks and arbitrary units, to estimate sizes."""
    costs = budget.costs
    neurons, groups = ([fractional_ranks(torch.arange(n)) for n in kind] for kind in (costs.neurons, costs.groups))
    return keep_masks(budget, [r.repeat(e) for r, e in zip(neurons, costs.of_experts, strict=True)], groups)


def equal_widths(
    budget: Budget, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor] | None = None
) -> Masks:
    """Return masks with the same widths for every block, the largest ones that meet the target; see `keep_masks`.

    With attention in scope every block keeps as many KV groups as blocks of different widths would keep on average, and
    the width of the FFN makes up the rest.
    """
    costs, target, width_multiple, prices = budget.costs, budget.target, budget.width_multiple, budget.costs.prices
    narrow, wide = min(filter(None, costs.neurons)), max(costs.neurons)
    # an unchanged width need not be a multiple of `width_multiple`
    grid = [wide] * (narrow == wide) + [*range(narrow // width_multiple * width_multiple, 0, -width_multiple)]

    def gone(tables: Sequence[Sequence[int]], kept: int) -> int:
        """Return the removed cost if every block keeps `kept` units."""
        return sum(table[-1] - table[min(kept, len(table) - 1)] for table in tables)

    def widest(left: int) -> int:
        """Return the widest FFN that removes the cost `left`; 0 if there is none."""
        return [*grid, 0][bisect_left(grid, left, key=lambda width: gone(prices.neurons, width))]

    device = neuron_margins[0].device
    attention = [torch.ones(n, dtype=torch.bool, device=device) for n in costs.groups]
    if costs.attention:
        free = replace(budget, costs=replace(costs, uniform=False))
        kept = int(torch.cat(keep_masks(free, neuron_margins, group_margins).attention).sum())
        some = [n for n in costs.groups if n]  # blocks with prunable attention
        groups = max(1, min(round(kept / len(some)), *some))

        left = {kept: target - gone(prices.groups, kept) for kept in range(1, min(some) + 1)}
        while groups > 1 and widest(left[groups]) < width_multiple:  # more than the FFN can make up
            groups -= 1
        fillable = gone(prices.neurons, width_multiple)
        # Keep groups that exceed the target, as long as neurons can be removed instead.
        while left[groups] < 0 and left.get(groups + 1, fillable + 1) <= fillable:
            groups += 1
        attention = [top_of_experts(m, groups) if len(m) else m.bool() for m in group_margins]
        target = left[groups]
    width = widest(target)
    pairs = zip(neuron_margins, costs.of_experts, strict=True)
    ffn = [top_of_experts(m, width, experts=e) if len(m) else m.bool() for m, e in pairs]
    return Masks(ffn, attention)


def cut_margin(
    masks: Masks,
    neuron_margins: Sequence[Tensor],
    of_experts: Sequence[int] | None = None,
    group_margins: Sequence[Tensor] = (),
) -> Tensor:
    """Return the margin at which the budget cuts the common order of units, ().

    It is the largest margin among removed neurons. If no neuron is removed, because only KV groups cost something, it
    is the largest among removed KV groups; if none is removed either, 0.

    Args:
        masks: masks that meet the budget.
        neuron_margins: per block (N,) or (E x N,).
        of_experts: number of experts of each block, whose slots are compared. None: no experts.
        group_margins: per block (G,); may be empty.
    """
    parts = [
        (slot_margins(m, e), keep if e == 1 else keep.view(e, -1).sort(1).values[0])
        for m, keep, e in zip(neuron_margins, masks.ffn, of_experts or [1] * len(masks.ffn), strict=True)
    ]

    def largest(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        # A block that keeps nothing was removed as a whole, independently of its margins.
        kept = [m.masked_fill(keep | ~keep.any(), -torch.inf) for m, keep in parts]
        return torch.cat([*kept, kept[0].new_full((1,), -torch.inf)]).max()  # there may be no units of a kind

    cut = largest(parts)
    if group_margins:
        cut = torch.where(cut == -torch.inf, largest(zip(group_margins, masks.attention, strict=True)), cut)
    return cut.masked_fill(cut == -torch.inf, 0.0)
