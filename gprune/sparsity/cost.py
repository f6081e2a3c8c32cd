"""Currencies of the budget: parameters, KV cache, or a function that is registered in `COST`.

The function is called with the model and its blocks. It returns whole numbers: for each block the cost of a neuron, of
a KV group and of the whole block; and the cost of the rest of the model.
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
    """Costs of a model, in whole numbers."""

    neurons: Sequence[Sequence[int]]  # per block: cost of its FFN if it keeps 0, 1, ..., all neurons (or slots)
    groups: Sequence[Sequence[int]]  # per block: cost of its attention if it keeps 0, 1, ..., all KV groups
    blocks: Sequence[int]  # cost of each whole block
    rest: int = 0  # cost of everything outside of blocks

    @classmethod
    def by_unit(cls, costs: Costs, neurons: Sequence[int], groups: Sequence[int]) -> Price:
        """Return costs in which all neurons of a block cost the same, and all its KV groups; with their numbers."""
        neuron, group, blocks = zip(*costs[0], strict=True)
        kinds = zip(neuron, neurons, strict=True), zip(group, groups, strict=True)
        tables = ([range(0, c * n + 1, c) if c else [0] * (n + 1) for c, n in kind] for kind in kinds)
        return cls(*tables, blocks, costs[1])

    @property
    def model(self) -> int:
        """Cost of the whole model."""
        return sum(self.blocks) + self.rest


@COST.register("parameters")
def weighed(model: Any, blocks: Sequence[Any], weight: Callable[[Any], int] = lambda parameter: 1) -> Costs:
    """Numbers of parameters, each multiplied by `weight` of its tensor."""
    all_of, whole = sum(weight(p) * p.numel() for p in model.parameters()), [b.whole_cost(weight) for b in blocks]
    units = [[b.unit_cost(kind, weight) for b in blocks] for kind in ("ffn", "attention")]
    return [*zip(*units, whole, strict=True)], all_of - sum(whole)


@COST.register("kv_cache")
def kv_cache(model: Any, blocks: Sequence[Any]) -> Costs:
    """Numbers per token in the KV cache."""
    return [(0, 2 * b.head_dim, 2 * b.head_dim * b.kv_groups) for b in blocks], 0
