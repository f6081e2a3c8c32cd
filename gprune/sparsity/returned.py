"""Check masks, margins and thresholds that registered functions and stages return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gprune.errors import UserError
from gprune.models.masks import Masks
from gprune.registry import Registry
from gprune.sparsity.budget import Budget

Pair = tuple[list[Tensor], list[Tensor]]  # neurons per block, KV groups per block


def checked_pair(
    registry: Registry, name: str, what: str, value: Any, sizes: Sequence[Sequence[int]], of: str = "finite numbers"
) -> Pair:
    """Check that a value is (neurons, KV groups) with a tensor for each block, and return it on the CPU."""

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


def checked_masks(registry: Registry, name: str, value: Any, budget: Budget, *, exact: bool = True) -> Masks:
    """Check that a value is masks that fit the units of a budget and meet it, and return them."""
    costs = budget.costs
    entry = f"{registry.kind.capitalize()} '{name}'"
    if not isinstance(value, Masks):
        raise UserError(f"{entry} must return Masks; got {type(value).__name__}.")
    neurons = [experts * width for experts, width in zip(costs.experts_per_block, costs.neurons, strict=True)]
    masks = Masks(*checked_pair(registry, name, "masks", (value.ffn, value.attention), (neurons, costs.groups), "bool"))
    step = _largest_step(budget)
    removed = costs.removed(masks)
    target = budget.target
    if removed < target or (exact and removed >= target + step):
        needed = f"at least {target:,}" + (f", and less than {target + step:,}" if exact else "")
        raise UserError(f"{entry} must return masks on budget, which remove {needed}; got {removed:,}.")
    return masks


def _largest_step(budget: Budget) -> int:
    """Return the largest cost of one more unit: `width_multiple` neurons, or a KV group if attention is in scope.

    If all blocks must have the same width, a step is removed in every block.
    """
    costs = budget.costs
    prices = budget.rest.costs.prices
    combine = sum if costs.uniform else max

    def largest(tables: Sequence[Sequence[int]], size: int) -> int:
        """Return the largest cost of `size` units that follow each other, from tables of `Price`."""
        by_block = []
        for table in tables:
            steps = [upper - lower for lower, upper in zip(table, table[size:], strict=False)]
            by_block.append(max(steps, default=0))
        return combine(by_block)

    step = largest(prices.neurons, budget.width_multiple)
    if costs.attention:
        step = max(step, largest(prices.groups, 1))
    return step
