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
        self.budget, self.rest, self.device = budget, budget.rest, device
        # Kinds in scope without a share, from coarse to fine
        self.steps = {kind: Steps(self.rest.of_kind(kind), self.rest, device) for kind in self.rest.finer}

    def __call__(self, margins: Mapping[str, Tensor]) -> Masks:
        """Return masks from margins; see `keep_masks`."""
        in_kept = self.cut(self.budget.of_kept_experts(margins))
        in_rest = {u.key: u for u in self.rest.units}
        masks = {}
        for u in self.budget.units:
            if u.key in in_kept:
                masks[u.key] = in_kept[u.key]
            elif u.kind in ("neurons", "kv_groups", *self.steps):  # all units are kept, or all removed with their layer
                size = in_rest.get(u.key, u).size
                masks[u.key] = torch.full((size,), u.key in in_rest, device=self.device)
        return Masks(self.budget.with_removed_experts(masks))

    def cut(self, margins: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return keep masks of the rest's units of each kind in scope from margins, by key."""
        of_kinds = {kind: [margins[u.key] for u in steps.units] for kind, steps in self.steps.items()}
        in_order = {kind: steps.sort(of_kinds[kind]) for kind, steps in self.steps.items()}
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
            u.key: mask
            for kind, steps in self.steps.items()
            for u, mask in zip(steps.units, steps.masks(of_kinds[kind], in_order[kind][1], removed[kind]), strict=True)
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


def keep_masks(budget: Budget, margins: Mapping[str, Tensor]) -> Masks:
    """Remove units in order of margin (ties by block, then index) until their cost reaches `budget.target`.

    Units of a coarse kind that come before the target in the common order of all units are removed first, and finer
    ones make up the rest. So the overshoot is less than one step of the finest kind, such as `width_multiple` neurons,
    and no KV group is removed that exceeds the target by far. All units but the `least` of each set may be removed.

    Layers and experts that the budget removes as a whole keep nothing. Other units make up the rest of the target.
    Protected layers keep everything. If all blocks must have the same widths, the overshoot is less than one step in
    every block.

    Margins are (rows x count,) by key, for the kinds in scope. Widths of FFNs that lose neurons are multiples of
    `width_multiple`.
    """
    device = next((m.device for m in margins.values()), torch.device("cpu"))  # no kinds but experts may be in scope
    return Cut(budget, device)(margins)


def uniform_masks(budget: Budget) -> Masks:
    """Return masks that meet a budget with equally sparse blocks and arbitrary units, to estimate sizes."""
    units = [u for u in budget.units if u.kind not in ("layer", "experts")]
    return keep_masks(budget, {u.key: fractional_ranks(torch.arange(u.count)).repeat(u.rows) for u in units})


Removal = tuple[Tensor, Tensor]  # margins of units (or slots), and which of them are kept


def slots_of(budget: Budget, margins: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Removal]:
    """Return the margins of units (or slots) by key and which of them are kept, without removed experts."""
    margins, masks, slots = budget.of_kept_experts(margins), budget.of_kept_experts(masks), {}
    for u in budget.units:
        if u.key in margins:
            rows = u.rows - len(budget.lost.get(u.inside, ()))
            keep = masks[u.key]
            # All experts keep the same number of neurons, and these have the largest margins.
            kept_slots = keep if rows == 1 else keep.view(rows, -1).sort(1).values[0]
            slots[u.key] = slot_margins(margins[u.key], rows), kept_slots
    return slots


def cut_margin(slots: Mapping[str, Removal], kinds: Sequence[str]) -> Tensor:
    """Return the margin at which the budget cuts the common order of units, ().

    It is the largest margin among removed units (or slots) of the finest kind. If none of them is removed, because only
    coarser ones cost something, it is the largest among the next coarser kind; if none is removed at all, 0. `kinds`
    are those in scope, from coarse to fine.
    """
    largest = next(iter(slots.values()))[0].new_full((), -torch.inf)
    for kind in reversed(kinds):
        of_kind = [slot for key, slot in slots.items() if key.startswith(f"{kind}.")]
        if of_kind:
            largest = torch.where(largest == -torch.inf, _largest_removed(of_kind), largest)
    return largest.masked_fill(largest == -torch.inf, 0.0)


def _largest_removed(slots: Sequence[Removal]) -> Tensor:
    """Return the largest margin among removed units, (); -inf if none is removed.

    Units of which nothing is kept were removed as a whole, independently of their margins, and are ignored.
    """
    removed = [margin.masked_fill(keep | ~keep.any(), -torch.inf) for margin, keep in slots]
    return torch.cat([*removed, removed[0].new_full((1,), -torch.inf)]).max()  # the sets may be empty
