"""Prices: what it costs to keep 0, 1, ..., all of each set of units, in parameters or another currency.

Currencies are parameters, the KV cache, bytes, seconds, or a function that is registered in `COST`. The function is
called with the model and its blocks. It returns whole numbers: for each block the cost of a neuron, of a KV group and
of the whole block, and optionally of an expert; and the cost of the rest of the model. `bytes` and `seconds` depend on
the run, so `method.plan.Pricing` computes them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gprune.registry import Registry

# Result of a registered function: costs of (a neuron, a KV group, the whole block) for each block, and of the rest. A
# fourth number is the cost of an expert with its row of the router; by default that of its neurons.
Costs = tuple[Sequence[tuple[int, ...]], int]
COST: Registry[Callable[..., Costs]] = Registry("cost")
Price = Mapping[str, Sequence[int]]  # key of `Units` -> cost of keeping 0, 1, ..., `count` of them


def cost_beyond(table: Sequence[int], kept: int) -> int:
    """Return the cost of all units after the first `kept`, from a table of `Price`."""
    return table[-1] - table[min(kept, len(table) - 1)]


def unit_key(kind: str, number: int) -> str:
    """Return the key of the units of a kind in a block (or of a layer, by its number)."""
    return f"{kind}.{number}"


def price_of(costs: Costs, blocks: Sequence[Any]) -> tuple[dict[str, Sequence[int]], int]:
    """Convert the result of a registered function to a price of the model, and the cost of the rest."""
    by_block, rest = costs
    tables, wholes = [], []
    for block, of_block in zip(blocks, by_block, strict=True):
        neuron, group, whole, *of_expert = map(_whole_number, of_block)
        (expert,) = of_expert or [neuron * block.neurons // block.experts]
        counts = {"neurons": (neuron, block.neurons), "kv_groups": (group, block.kv_groups)}
        counts["experts"] = expert, block.experts
        tables.append({kind: _table(cost, units) for kind, (cost, units) in counts.items()})
        wholes.append(whole)
    return price_of_tables(tables, wholes, blocks), _whole_number(rest)


def price_of_tables(
    tables: Sequence[Mapping[str, Sequence[int]]], wholes: Sequence[int], blocks: Sequence[Any]
) -> dict[str, Sequence[int]]:
    """Return the price of a model from the tables of each block by kind of unit, and the cost of each whole block."""
    price: dict[str, Sequence[int]] = {}
    for block, of_block, whole in zip(blocks, tables, wholes, strict=True):
        price |= {unit_key(kind, block.index): table for kind, table in of_block.items()}
        layer = unit_key("layer", block.layer_index)
        price[layer] = [0, price.get(layer, [0])[-1] + whole]
    return price


def _table(cost: int, units: int) -> Sequence[int]:
    """Return the costs of 0, 1, ..., all units."""
    return range(0, cost * units + 1, cost) if cost else [0] * (units + 1)


def _whole_number(cost: Any) -> int:
    """Return a cost as an int. Raise TypeError if it is not a whole number, and ValueError if it is negative."""
    number = operator.index(cost)
    if number < 0:
        raise ValueError(f"{number} is less than 0")
    return number


@COST.register("parameters")
def parameter_costs(model: Any, blocks: Sequence[Any], weight: Callable[[Any], int] = lambda parameter: 1) -> Costs:
    """Return numbers of parameters, each multiplied by the weight of its tensor."""
    by_block = costs_of_blocks(blocks, weight)
    total = sum(weight(parameter) * parameter.numel() for parameter in model.parameters())
    return by_block, total - sum(whole for _, _, whole, _ in by_block)


def costs_of_blocks(
    blocks: Sequence[Any], weight: Callable[[Any], int] = lambda parameter: 1
) -> list[tuple[int, int, int, int]]:
    """Return the costs of each block in parameters, as a registered function does."""
    return [
        (
            block.unit_cost("ffn", weight), block.unit_cost("attention", weight), block.whole_cost(weight),
            block.expert_cost(weight),
        )
        for block in blocks
    ]  # fmt: skip


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
