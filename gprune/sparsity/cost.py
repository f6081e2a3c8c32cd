"""What a budget counts: parameters, or what somebody registers in `COST`, a function of the model and its blocks.

It returns whole numbers: of each block what a neuron, a KV group and all of it cost, and what the rest of the model
costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gprune.registry import Registry

Costs = tuple[Sequence[tuple[int, int, int]], int]
COST: Registry[Callable[..., Costs]] = Registry("cost")


@dataclass(frozen=True)
class Price:
    """What a model costs, in whole numbers."""

    neurons: Sequence[Sequence[int]]  # of each block, by the neurons (or slots) that it keeps: none to all
    groups: Sequence[Sequence[int]]  # the same by its KV groups
    blocks: Sequence[int]  # of each block with all that is in it
    rest: int = 0  # of what is never pruned

    @classmethod
    def by_unit(cls, costs: Costs, neurons: Sequence[int], groups: Sequence[int]) -> Price:
        """Where all neurons of a block cost the same, and all its KV groups, of which there are so many."""
        neuron, group, blocks = zip(*costs[0], strict=True)
        kinds = zip(neuron, neurons, strict=True), zip(group, groups, strict=True)
        tables = ([range(0, c * n + 1, c) if c else [0] * (n + 1) for c, n in kind] for kind in kinds)
        return cls(*tables, blocks, costs[1])

    @property
    def model(self) -> int:
        """Of the whole model."""
        return sum(self.blocks) + self.rest


@COST.register("parameters")
def weighed(model: Any, blocks: Sequence[Any], weight: Callable[[Any], int] = lambda parameter: 1) -> Costs:
    """Parameters, or what their numbers weigh."""
    all_of, whole = sum(weight(p) * p.numel() for p in model.parameters()), [b.whole_cost(weight) for b in blocks]
    units = [[b.unit_cost(kind, weight) for b in blocks] for kind in ("ffn", "attention")]
    return [*zip(*units, whole, strict=True)], all_of - sum(whole)


@COST.register("kv_cache")
def kv_cache(model: Any, blocks: Sequence[Any]) -> Costs:
    """Numbers per token that a KV cache holds."""
    return [(0, 2 * b.head_dim, 2 * b.head_dim * b.kv_groups) for b in blocks], 0
