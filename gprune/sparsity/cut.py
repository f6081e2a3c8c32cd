"""Convert margins to keep masks that reach the budget, and exceed it by less than the cost of one step.

The *margin* of a unit is logit(p_i) - t_m: its rank inside its module, minus the module's threshold. Units of the whole
model are removed in order of margin, smallest first, until their cost reaches the target.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gprune.importance.scores import fractional_ranks
from gprune.models.blocks import Block
from gprune.models.masks import Masks
from gprune.sparsity.budget import BlockUnits, Budget, narrowest_width
from gprune.sparsity.cost import cost_beyond


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


def keep_top_neurons(block: Block | BlockUnits, margin: Tensor, kept: int | Tensor) -> Tensor:
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


def _step_costs(table: Sequence[int], removed_after_step: Tensor) -> Tensor:
    """Return the costs of a block's steps, (steps,) int64, from the number of units that are removed after each."""
    remaining = torch.tensor([table[-1 - removed] for removed in [0, *removed_after_step.tolist()]])
    return remaining[:-1] - remaining[1:]


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
        self.whole = budget
        self.kept = budget.kept
        self.budget = budget.rest  # of the blocks and experts that are not removed as a whole
        self.slots = Segments([block.neurons for block in self.budget.units], device)
        self.groups = Segments([block.groups for block in self.budget.units], device)
        self._init_neuron_steps(device)
        self._init_group_steps(device)

    def _init_neuron_steps(self, device: torch.device) -> None:
        """Compute the steps in which neurons are removed."""
        width_multiple = self.budget.width_multiple
        # Number of neurons (or slots) of each block that may be removed.
        removable = [block.removable_neurons(width_multiple) for block in self.budget.units]
        tables = [block.costs.neurons for block in self.budget.units]
        # The cost of all removable neurons.
        self.removable_cost = sum(t[-1] - t[-1 - n] for t, n in zip(tables, removable, strict=True))
        # For each block: number of neurons that are removed after each step. The first step removes the remainder, so
        # that all further widths are multiples of `width_multiple`.
        removed_after_step = [
            torch.arange(n % width_multiple or width_multiple, n + 1, width_multiple) if n else torch.arange(0)
            for n in removable
        ]
        sizes = torch.cat([removed.diff(prepend=removed.new_zeros(1)) for removed in removed_after_step])
        starts = self.slots.starts
        last = torch.cat([start + n - 1 for start, n in zip(starts, removed_after_step, strict=True)])
        step_costs = torch.cat([_step_costs(t, n) for t, n in zip(tables, removed_after_step, strict=True)])
        # One entry per step, (steps,): number of neurons it removes, index of the last of them in the output of
        # `Segments.sort`, its cost, its block.
        self.step_size = sizes.to(device, non_blocking=True)
        self.step_last = last.to(device, non_blocking=True)
        self.step_cost = step_costs.to(device, non_blocking=True)
        steps_per_block = [len(removed) for removed in removed_after_step]
        self.step_block = repeat_values(range(len(steps_per_block)), steps_per_block, device)

    def _init_group_steps(self, device: torch.device) -> None:
        """Compute places and costs of removable KV groups, which are removed one at a time.

        The KV group with the largest margin in a block is never removed.
        """
        removable = [block.removable_groups for block in self.budget.units]
        starts = zip(self.groups.starts, removable, strict=True)
        indices = torch.cat([torch.arange(start, start + n) for start, n in starts])
        tables = zip([block.costs.groups for block in self.budget.units], removable, strict=True)
        group_cost = torch.cat([_step_costs(table, torch.arange(1, n + 1)) for table, n in tables])
        # One entry per removable group, (removable groups,): its index in the output of `Segments.sort`, its cost.
        self.group_index = indices.to(device, non_blocking=True)
        self.group_cost = group_cost.to(device)

    def __call__(self, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor] | None = None) -> Masks:
        """Return masks from margins; see `keep_masks`."""
        of_kept_groups = None if group_margins is None else [group_margins[b] for b in self.kept]
        neuron_margins = self.whole.of_kept_neurons(neuron_margins)
        masks = self._masks([neuron_margins[b] for b in self.kept], of_kept_groups)
        ffn, attention = list(masks.ffn), list(masks.attention)
        for b, block in enumerate(self.whole.units):
            if b not in self.kept:
                ffn.insert(b, masks.ffn[0].new_zeros(block.all_neurons))
                attention.insert(b, masks.attention[0].new_zeros(block.groups))
        return Masks(self.whole.with_removed_neurons(ffn), attention)

    def _masks(self, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor] | None) -> Masks:
        """Return masks of blocks that are not removed as a whole, from their margins."""
        target = self.budget.target
        units = self.budget.units
        slots = [
            slot_margins(m.detach().double(), block.experts) for m, block in zip(neuron_margins, units, strict=True)
        ]
        margins, order = self.slots.sort(slots)
        keys = margins[self.step_last]
        keep_groups = torch.ones_like(self.groups.block, dtype=torch.bool)
        if self.budget.attention:
            assert group_margins is not None
            sorted_group_margins, group_order = self.groups.sort(group_margins)
            removed_groups = self._select_groups(sorted_group_margins[self.group_index], keys)
            keep_groups[group_order[self.group_index]] = ~removed_groups
            target = target - (self.group_cost * removed_groups).sum()
        removed_by_step = self.step_size * _select_until(keys, self.step_cost, target)
        # Steps of one block are removed in order: keys do not decrease, and ties are broken by position.
        removed = torch.zeros(len(slots), dtype=torch.long, device=keys.device)
        removed.index_add_(0, self.step_block, removed_by_step)
        keep_in_order = self.slots.place >= removed[self.slots.block]
        ffn = list(torch.empty_like(keep_in_order).scatter_(0, order, keep_in_order).split(self.slots.sizes))
        for b, block in enumerate(units):
            if block.experts > 1:
                ffn[b] = keep_top_neurons(block, neuron_margins[b], block.neurons - removed[b])
        return Masks(ffn, list(keep_groups.split(self.groups.sizes)))

    def _select_groups(self, group_keys: Tensor, step_keys: Tensor) -> Tensor:
        """Return which removable KV groups are removed, by the common order of groups and steps of neurons."""
        target = self.budget.target
        all_keys = torch.cat([group_keys, step_keys])
        all_costs = torch.cat([self.group_cost, self.step_cost])
        selected = _select_until(all_keys, all_costs, target)[: len(group_keys)]
        order = group_keys.argsort(stable=True)  # selected groups come first
        cost_in_order = self.group_cost[order]
        cost_after = cost_in_order.cumsum(0)  # cost of each group and all groups before it
        cost_before = cost_after - cost_in_order
        # The last groups may exceed the target by much more than a neuron. Keep such groups, last ones first, as long
        # as neurons can be removed instead.
        exceeds = (cost_after > target) & (target - cost_before <= self.removable_cost)
        return torch.empty_like(selected).scatter_(0, order, selected[order] & ~exceeds)


class EqualWidthCut(Cut):
    """Cut to the same widths for every block, the largest ones that meet the target.

    With attention in scope every block keeps as many KV groups as blocks of different widths would keep on average, and
    the width of the FFN makes up the rest.
    """

    def _masks(self, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor] | None) -> Masks:
        """Return masks of blocks that are not removed as a whole, from their margins."""
        units = self.budget.units
        target = self.budget.target
        device = neuron_margins[0].device
        attention = [torch.ones(block.groups, dtype=torch.bool, device=device) for block in units]
        if self.budget.attention:
            of_different_widths = super()._masks(neuron_margins, group_margins)
            groups = self._equal_groups(int(torch.cat(of_different_widths.attention).sum()))
            # A block without KV groups has an empty mask.
            attention = [keep_top(margins, groups) if len(margins) else margins.bool() for margins in group_margins]
            target -= self._cost_beyond_groups(groups)
        width = self._widest(target)
        ffn = [
            keep_top_neurons(block, margins, width) if len(margins) else margins.bool()
            for margins, block in zip(neuron_margins, units, strict=True)
        ]
        return Masks(ffn, attention)

    def _cost_beyond_width(self, width: int) -> int:
        """Return the removed cost if the FFN of every block keeps `width` neurons (or slots)."""
        return sum(cost_beyond(block.costs.neurons, width) for block in self.budget.units)

    def _cost_beyond_groups(self, groups: int) -> int:
        """Return the removed cost if every block keeps `groups` KV groups."""
        return sum(cost_beyond(block.costs.groups, groups) for block in self.budget.units)

    def _widest(self, target: int) -> int:
        """Return the largest common width of FFNs that removes at least the cost `target`; 0 if there is none."""
        multiple = self.budget.width_multiple
        narrowest = narrowest_width(self.budget.units)
        widest = max(block.neurons for block in self.budget.units)
        widths = list(range(narrowest // multiple * multiple, 0, -multiple))
        if narrowest == widest:
            widths.insert(0, widest)  # an unchanged width need not be a multiple of `width_multiple`
        # Costs rise along the descending widths, so the first width that removes enough is the largest one.
        index = bisect_left(widths, target, key=self._cost_beyond_width)
        return widths[index] if index < len(widths) else 0

    def _equal_groups(self, kept_groups: int) -> int:
        """Return the number of KV groups that every block keeps, from their total number in blocks of other widths."""
        width_multiple = self.budget.width_multiple
        group_counts = [
            block.groups for block in self.budget.units if block.groups
        ]  # of blocks with prunable attention
        max_groups = min(group_counts)
        groups = max(1, min(round(kept_groups / len(group_counts)), max_groups))

        def remaining(kept: int) -> int:
            """Return the cost that FFNs have to make up if every block keeps `kept` KV groups."""
            return self.budget.target - self._cost_beyond_groups(kept)

        # Remove more groups if the FFNs cannot make up the rest.
        while groups > 1 and self._widest(remaining(groups)) < width_multiple:
            groups -= 1
        # Keep groups that exceed the target, as long as neurons can be removed instead. FFNs of different widths lose
        # neurons in any case.
        smallest_cost = self._cost_beyond_width(self._widest(0))
        largest_cost = self._cost_beyond_width(width_multiple)
        while remaining(groups) < smallest_cost and groups < max_groups and remaining(groups + 1) <= largest_cost:
            groups += 1
        return groups


def cut_of(budget: Budget, device: torch.device) -> Cut:
    """Return the cut of a budget: to equal widths if all blocks must have the same widths (`uniform_width`)."""
    return EqualWidthCut(budget, device) if budget.uniform else Cut(budget, device)


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
    return cut_of(budget, neuron_margins[0].device)(neuron_margins, group_margins)


def uniform_masks(budget: Budget) -> Masks:
    """Return masks that meet a budget with equally sparse blocks and arbitrary units, to estimate sizes."""
    neuron_ranks = [fractional_ranks(torch.arange(block.neurons)).repeat(block.experts) for block in budget.units]
    group_ranks = [fractional_ranks(torch.arange(block.groups)) for block in budget.units]
    return keep_masks(budget, neuron_ranks, group_ranks)


def cut_margin(
    masks: Masks,
    neuron_margins: Sequence[Tensor],
    of_experts: Sequence[int] | None = None,
    group_margins: Sequence[Tensor] = (),
) -> Tensor:
    """Return the margin at which the budget cuts the common order of units, (), with margins as for `keep_masks`.

    It is the largest margin among removed neurons (or slots; `of_experts` has the number of experts of each block). If
    no neuron is removed, because only KV groups cost something, it is the largest among removed KV groups; if none is
    removed either, 0.
    """
    experts = of_experts or [1] * len(masks.ffn)
    neurons = [
        (slot_margins(margin, e), _slot_mask(keep, e))
        for margin, keep, e in zip(neuron_margins, masks.ffn, experts, strict=True)
    ]
    largest = _largest_removed(neurons)
    if group_margins:
        largest_group = _largest_removed(list(zip(group_margins, masks.attention, strict=True)))
        largest = torch.where(largest == -torch.inf, largest_group, largest)
    return largest.masked_fill(largest == -torch.inf, 0.0)


def margin_of_cut(
    budget: Budget, masks: Masks, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor]
) -> Tensor:
    """Return `cut_margin` of a budget's masks, without neurons of experts that are removed as a whole."""
    kept = replace(masks, ffn=budget.of_kept_neurons(masks.ffn))
    return cut_margin(kept, budget.of_kept_neurons(neuron_margins), budget.kept_experts, group_margins)


def _slot_mask(keep: Tensor, experts: int) -> Tensor:
    """Return the keep mask of slots in order of their margins, (E x N,) -> (N,), from the keep mask of neurons.

    All experts keep the same number of neurons, and these have the largest margins. There are no removed experts.
    """
    if experts == 1:
        return keep
    return keep.view(experts, -1).sort(1).values[0]


def _largest_removed(blocks: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the largest margin among removed units, (), from (margins, keep mask) of blocks; -inf if none is removed.

    A block that keeps nothing was removed as a whole, independently of its margins, and is ignored.
    """
    removed = [margin.masked_fill(keep | ~keep.any(), -torch.inf) for margin, keep in blocks]
    return torch.cat([*removed, removed[0].new_full((1,), -torch.inf)]).max()  # a model may have no units of a kind
