"""Currencies of the budget: parameters, KV cache, bytes, seconds, or a function that is registered in `COST`.

The function is called with the model and its blocks. It returns whole numbers: for each block the cost of a neuron, of
a KV group and of the whole block, and optionally of an expert; and the cost of the rest of the model. `bytes` and
`seconds` depend on the run, so `method.plan.Pricing` computes them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gprune.registry import Registry

# Result of a registered function: costs of (a neuron, a KV group, the whole block) for each block, and of the rest. A
# fourth number is the cost of an expert with its row of the router; by default that of its neurons.
Costs = tuple[Sequence[tuple[int, ...]], int]
COST: Registry[Callable[..., Costs]] = Registry("cost")


@dataclass(frozen=True)
class BlockCosts:
    """Costs of one block, in whole numbers."""

    neurons: Sequence[int]  # cost of the FFN if it keeps 0, 1, ..., all neurons (or slots)
    groups: Sequence[int]  # cost of the attention if it keeps 0, 1, ..., all KV groups
    whole: int  # cost of the whole block, norms included
    expert: int = 0  # cost of an expert with its row of the router, if it keeps all neurons

    @classmethod
    def by_unit(
        cls, neuron: int, group: int, whole: int, expert: int | None = None, *, neurons: int, groups: int,
        experts: int = 1,
    ) -> BlockCosts:  # fmt: skip
        """Return the costs of a block in which all neurons (or slots of experts) cost the same, and all KV groups."""

        def table(cost: int, units: int) -> Sequence[int]:
            """Return the costs of 0, 1, ..., all units."""
            return range(0, cost * units + 1, cost) if cost else [0] * (units + 1)

        of_neurons, of_groups = table(_whole_number(neuron), neurons), table(_whole_number(group), groups)
        of_expert = of_neurons[-1] // experts if expert is None else _whole_number(expert)
        return cls(of_neurons, of_groups, _whole_number(whole), of_expert)


ModelCosts = tuple[list[BlockCosts], int]  # of each block, and of the rest of the model


def costs_of_blocks(costs: Costs, blocks: Sequence[Any]) -> ModelCosts:
    """Convert the result of a registered function to tables of costs."""
    by_block, rest = costs
    of_blocks = [
        BlockCosts.by_unit(*of_block, neurons=block.neurons, groups=block.kv_groups, experts=block.experts)
        for of_block, block in zip(by_block, blocks, strict=True)
    ]
    return of_blocks, _whole_number(rest)


def cost_beyond(table: Sequence[int], kept: int) -> int:
    """Return the cost of all units after the first `kept`, from a table of `BlockCosts`."""
    return table[-1] - table[min(kept, len(table) - 1)]


def _whole_number(cost: Any) -> int:
    """Return a cost as an int. Raise TypeError if it is not a whole number, and ValueError if it is negative."""
    number = operator.index(cost)
    if number < 0:
        raise ValueError(f"{number} is less than 0")
    return number


@COST.register("parameters")
def parameter_costs(model: Any, blocks: Sequence[Any], weight: Callable[[Any], int] = lambda parameter: 1) -> Costs:
    """Return numbers of parameters, each multiplied by the weight of its tensor."""
    by_block = [
        (
            block.unit_cost("ffn", weight), block.unit_cost("attention", weight), block.whole_cost(weight),
            block.expert_cost(weight),
        )
        for block in blocks
    ]  # fmt: skip
    total = sum(weight(parameter) * parameter.numel() for parameter in model.parameters())
    return by_block, total - sum(whole for _, _, whole, _ in by_block)


@COST.register("kv_cache")
def kv_cache(model: Any, blocks: Sequence[Any]) -> Costs:
    """Return how many numbers the KV cache stores per token: a key and a value of `head_dim` for each KV group."""
    by_block = [(0, 2 * block.head_dim, 2 * block.head_dim * block.kv_groups) for block in blocks]
    return by_block, 0


@COST.register("bytes")
@COST.register("seconds")
def costs_of_run(model: Any, blocks: Sequence[Any]) -> Costs:
    """Costs of the export (half bits, 1/16 byte) and of this machine (picoseconds), which depend on the run."""
    raise NotImplementedError("method.plan.Pricing computes these costs")
