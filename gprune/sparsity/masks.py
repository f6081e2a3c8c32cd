"""From margins to keep masks that meet the budget exactly.

A unit's *margin* is logit(p_i) - t_m: its rank inside its module against the module's threshold. Units go in order
of margin, smallest first, over the whole model, until the counted parameters reach the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gprune.models.masks import Masks
from gprune.sparsity.budget import Budget, UnitCosts


def margins(p: Tensor, thresholds: Tensor, labels: Tensor) -> Tensor:
    """logit(p_i) - t_m for p (N,) in (0, 1), thresholds t (K,), labels (N,) in [0, K) -> (N,)."""
    return torch.logit(p) - thresholds[labels].to(p.dtype)


def slot_margins(margin: Tensor, experts: int) -> Tensor:
    """Margin of slot j: the mean over experts of their j-th smallest margin, (E x N,) -> (N,); unchanged for E = 1."""
    return margin if experts == 1 else margin.view(experts, -1).sort(1).values.mean(0)


def top_of_experts(margin: Tensor, kept: int, *, experts: int = 1) -> Tensor:
    """Keep mask (E x N,) of the `kept` neurons of each expert that come last in order of (margin, index)."""
    order = margin.detach().cpu().double().view(experts, -1).argsort(dim=1, stable=True)
    mask = torch.zeros(order.shape, dtype=torch.bool)
    return mask.scatter(1, order[:, order.shape[1] - kept :], True).flatten()


def _chunks(margin: Tensor, width_multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut one block's neurons, in order of (margin, index), into the steps in which they may go.

    Returns the order (N,), and the size and the key of each step. The key is the step's largest margin, so a step never
    goes before its last neuron would. The last `width_multiple` neurons are in no step: they stay.
    """
    N = len(margin)
    order = margin.argsort(stable=True)
    removable = N - width_multiple
    if removable == 0:  # as narrow as a block may be
        return order, order[:0], margin[:0]
    first = removable % width_multiple or width_multiple  # brings an odd width onto the grid
    ends = torch.arange(first, removable + 1, width_multiple)
    sizes = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.long))
    return order, sizes, margin[order][ends - 1]


def _take_until(keys: Tensor, cost: Tensor, target: int) -> Tensor:
    """Bool (S,): steps in order of (key, position), until their total cost reaches `target`."""
    taken = torch.zeros(len(keys), dtype=torch.bool)
    if target > 0:
        order = keys.argsort(stable=True)
        before = cost[order].cumsum(0) - cost[order]
        taken[order] = before < target
    return taken


def _keep_groups(
    costs: UnitCosts, group_margins: Sequence[Tensor], keys: Tensor, cost: Tensor, target: int
) -> list[Tensor]:
    """Masks of KV groups, from the common order of groups and of the neurons' steps (keys, cost)."""
    attention = [torch.ones(n, dtype=torch.bool) for n in costs.groups]
    orders = [m.detach().cpu().double().argsort(stable=True)[:-1] for m in group_margins]  # the best one stays
    orders = [order[:0] if b in costs.protected else order for b, order in enumerate(orders)]
    group_keys = torch.cat([m.detach().cpu().double()[o] for m, o in zip(group_margins, orders, strict=True)])
    group_cost = torch.cat([torch.full((len(o),), c) for o, c in zip(orders, costs.group, strict=True)])
    taken = _take_until(torch.cat([group_keys, keys]), torch.cat([group_cost, cost]), target)[: len(group_keys)]
    # The common order may end on groups that overshoot by far more than a neuron. Such groups stay, last ones first,
    # as long as neurons can fill the gap.
    fillable, gone = int(cost.sum()), int(group_cost[taken].sum())
    for last in group_keys.argsort(stable=True).flip(0).tolist():
        without = gone - int(group_cost[last])
        if taken[last] and gone > target:
            if target - without > fillable:
                break
            taken[last], gone = False, without
    for mask, order, falls in zip(attention, orders, taken.split([len(o) for o in orders]), strict=True):
        mask[order[falls]] = False
    return attention


def keep_masks(
    budget: Budget, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor] | None = None
) -> Masks:
    """Remove units in order of margin (ties by block, then index) until `budget.target` parameters are gone.

    With attention in scope, the KV groups that the common order of all units would remove fall first. Neurons fill the
    rest, so the overshoot is less than one neuron (one step of `width_multiple` neurons), and no group is removed only
    to land far beyond the target. Each block keeps `width_multiple` neurons and one KV group.

    Protected blocks lose nothing. Where all blocks have to be equally wide, each keeps its own largest margins
    (`equal_widths`), and the overshoot is less than one step in every block.

    Args:
        budget: costs of the units, the target and the grid of widths.
        neuron_margins: per block (N,) or (E x N,), any float dtype; smallest goes first.
        group_margins: per block (G,); needed where the budget has attention in scope.

    Returns:
        Masks that remove at least the target, and less than one more step. Blocks that lose neurons end up on a
        multiple of `width_multiple`; one that loses none keeps its width.
    """
    costs, target = budget.costs, budget.target
    if costs.uniform:
        return equal_widths(budget, neuron_margins, group_margins)
    slots = [slot_margins(m.detach().cpu().double(), e) for m, e in zip(neuron_margins, costs.of_experts, strict=True)]
    cut = [_chunks(m, len(m) if b in costs.protected else budget.width_multiple) for b, m in enumerate(slots)]
    keys = torch.cat([key for _, _, key in cut])
    cost = torch.cat([size * c for (_, size, _), c in zip(cut, costs.neuron, strict=True)])
    attention = [torch.ones(n, dtype=torch.bool) for n in costs.groups]
    if costs.attention:
        assert group_margins is not None
        attention = _keep_groups(costs, group_margins, keys, cost, target)
        target -= sum(c * int((~m).sum()) for c, m in zip(costs.group, attention, strict=True))
    steps = _take_until(keys, cost, target).split([len(size) for _, size, _ in cut])
    ffn = []
    for margin, e, (order, size, _), falls in zip(neuron_margins, costs.of_experts, cut, steps, strict=True):
        # Steps of one block go in order: keys grow with the step, and ties go by position.
        ffn.append(top_of_experts(margin, len(order) - int(size[falls].sum()), experts=e))
    return Masks(ffn, attention)


def equal_widths(
    budget: Budget, neuron_margins: Sequence[Tensor], group_margins: Sequence[Tensor] | None = None
) -> Masks:
    """Masks that give every block the same shape, the widest that removes at least the target; as `keep_masks`.

    With attention in scope every block keeps as many KV groups as blocks of free shapes would keep on average, and the
    width of the FFN makes up for the rest.
    """
    costs, target, width_multiple = budget.costs, budget.target, budget.width_multiple

    def widest(left: int) -> int:
        """The widest FFN that removes `left` parameters: a neuron of width costs the sum over blocks."""
        whole = sum(c * n for c, n in zip(costs.neuron, costs.neurons, strict=True))
        width = min((whole - max(left, 0)) // sum(costs.neuron), *costs.neurons)
        # a width that nothing asks to change need not lie on the grid
        return width if width == max(costs.neurons) else width // width_multiple * width_multiple

    attention = [torch.ones(n, dtype=torch.bool) for n in costs.groups]
    if costs.attention:
        free = replace(budget, costs=replace(costs, uniform=False))
        kept = [int(m.sum()) for m in keep_masks(free, neuron_margins, group_margins).attention]
        groups = max(1, min(round(sum(kept) / len(kept)), *costs.groups))

        def gone(groups: int) -> int:
            return sum(c * (n - groups) for c, n in zip(costs.group, costs.groups, strict=True))

        while groups > 1 and widest(target - gone(groups)) < width_multiple:  # more than the FFN can make up for
            groups -= 1
        attention = [top_of_experts(m, groups) for m in group_margins]
        target -= gone(groups)
    width = widest(target)
    ffn = [top_of_experts(m, width, experts=e) for m, e in zip(neuron_margins, costs.of_experts, strict=True)]
    return Masks(ffn, attention)


def cut_margin(masks: Masks, neuron_margins: Sequence[Tensor]) -> float:
    """The largest margin among removed neurons: where the budget cuts the common order. 0 if none is removed."""
    removed = torch.cat([m[~keep] for m, keep in zip(neuron_margins, masks.ffn, strict=True)])
    return float(removed.max()) if len(removed) else 0.0
