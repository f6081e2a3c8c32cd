"""Currencies of the budget: parameters, KV cache, bytes, seconds, or a function that is registered in `COST`.

The function is called with the model and its blocks. It returns whole numbers: for each block the cost of a neuron, of
a KV group and of the whole block; and the cost of the rest of the model. A currency that needs more is a `Currency`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gprune.features import Feature
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
        """Return costs of a model in which all neurons of a block cost the same, and all its KV groups."""
        by_block, rest = costs
        neuron, group, blocks = ([_whole_number(cost) for cost in of_kind] for of_kind in zip(*by_block, strict=True))

        def tables(unit_costs: Sequence[int], numbers: Sequence[int]) -> list[Sequence[int]]:
            """Return for each block the costs of 0, 1, ..., all units."""
            pairs = zip(unit_costs, numbers, strict=True)
            return [range(0, cost * number + 1, cost) if cost else [0] * (number + 1) for cost, number in pairs]

        return cls(tables(neuron, neurons), tables(group, groups), blocks, _whole_number(rest))

    @property
    def model(self) -> int:
        """Cost of the whole model."""
        return sum(self.blocks) + self.rest


class Currency(Feature):
    """A currency whose costs depend on more than the model and its blocks."""

    def price(self, pricing: Any) -> Price:
        """Return the costs of the model of a `pipeline.pricing.Pricing`."""
        raise NotImplementedError


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
        (block.unit_cost("ffn", weight), block.unit_cost("attention", weight), block.whole_cost(weight))
        for block in blocks
    ]
    total = sum(weight(parameter) * parameter.numel() for parameter in model.parameters())
    return by_block, total - sum(whole for _, _, whole in by_block)


@COST.register("kv_cache")
def kv_cache(model: Any, blocks: Sequence[Any]) -> Costs:
    """Return how many numbers the KV cache stores per token: a key and a value of `head_dim` for each KV group."""
    by_block = [(0, 2 * block.head_dim, 2 * block.head_dim * block.kv_groups) for block in blocks]
    return by_block, 0


class Bytes(Currency):
    """Half bits (1/16 byte) of the exported weights."""

    also_reads = frozenset({"export.dtype"})

    def identity(self, cfg: Any) -> dict[str, Any]:
        """Return the settings of the export that change its size."""
        unused = set() if cfg.export.format == "gguf" else {"format", "type"}
        return {"export": cfg.export.model_dump(exclude=unused)}

    def price(self, pricing: Any) -> Price:
        """Return the costs of units in half bits."""
        return pricing.price_of("bytes", pricing.exported_bytes)


COST.register("bytes")(Bytes())
