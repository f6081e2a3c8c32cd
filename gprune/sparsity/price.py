"""Prices: what it costs to keep 0, 1, ..., all of each set of units, in parameters or another currency.

Currencies are parameters, the KV cache, bytes, seconds, or a function that is registered in `COST`. The function is
called with the model and its units (`units_of`). It returns whole numbers by key of units: the cost of a unit, or the
costs of 0, 1, ..., all units. Units without a cost are free, and a layer without one costs as much as its units. The
key `REST` has the cost of everything outside of layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gprune.registry import Registry

if TYPE_CHECKING:  # this registry is imported to check flags, which should not wait for PyTorch
    from torch import Tensor

    from gprune.units.structure import Units

Costs = Mapping[str, int | Sequence[int]]  # result of a registered function
COSTS_OF_RUN = ("bytes", "seconds")  # of the export and of this machine, which `method.plan.Pricing` computes
COST: Registry[Callable[..., Costs]] = Registry("cost", others=COSTS_OF_RUN)
Price = Mapping[str, Sequence[int]]  # key of `Units` -> cost of keeping 0, 1, ..., `count` of them
REST = "rest"  # key of the cost outside of layers


def cost_beyond(table: Sequence[int], kept: int) -> int:
    """Return the cost of all units after the first `kept`, from a table of `Price`."""
    return table[-1] - table[min(kept, len(table) - 1)]


def price_of(costs: Costs, units: Sequence[Units]) -> tuple[dict[str, Sequence[int]], int]:
    """Convert the result of a registered function to a price of the model, and the cost of the rest.

    Raise TypeError or ValueError if costs are not whole numbers, or not those of the model's units.
    """
    price: dict[str, Sequence[int]] = {}
    if unknown := set(costs) - {REST, *(u.key for u in units)}:
        raise ValueError(f"the model has no units '{min(unknown)}'")
    for u in units:
        cost = costs.get(u.key, 0)
        if isinstance(cost, Sequence):
            if len(cost) != u.count + 1:
                raise ValueError(
                    f"'{u.key}' has {len(cost)} costs, and must have {u.count + 1}, of 0 to {u.count} units"
                )
            price[u.key] = [_whole_number(number) for number in cost]
        else:
            number = _whole_number(cost)
            price[u.key] = range(0, number * u.count + 1, number) if number else [0] * (u.count + 1)
    for u in units:
        if u.kind == "layer" and u.key not in costs:
            inner = (v for v in units if v.layer == u.layer and v.kind != "layer" and not v.inside)
            price[u.key] = [0, sum(price[v.key][-1] for v in inner)]
    return price, _whole_number(costs.get(REST, 0))


def parameters_of(units: Sequence[Units]) -> dict[str, Sequence[int]]:
    """Return the price of units in parameters."""
    return price_of({u.key: u.parameters for u in units}, units)[0]


def _whole_number(cost: Any) -> int:
    """Return a cost as an int. Raise TypeError if it is not a whole number, and ValueError if it is negative."""
    number = operator.index(cost)
    if number < 0:
        raise ValueError(f"{number} is less than 0")
    return number


@COST.register("parameters")
def parameter_costs(
    model: Any, units: Sequence[Units], weight: Callable[[Tensor], int] = lambda parameter: 1
) -> dict[str, int]:
    """Return numbers of parameters, each multiplied by the weight of its tensor."""
    from gprune.models.families import decoder_layers
    from gprune.models.units import unit_cost

    layers = decoder_layers(model)
    costs = {u.key: unit_cost(u, layers[u.layer], weight) if u.count else 0 for u in units}
    total = sum(weight(parameter) * parameter.numel() for parameter in model.parameters())
    return costs | {REST: total - sum(costs[u.key] for u in units if u.kind == "layer")}


@COST.register("kv_cache")
def kv_cache(model: Any, units: Sequence[Units]) -> dict[str, int]:
    """Return how many numbers the KV cache stores per token: a key and a value of `head_dim` for each KV group."""
    groups = [u for u in units if u.kind == "kv_groups" and u.count]
    return {u.key: 2 * int((u.inputs[0].unit >= 0).sum()) // u.count for u in groups}
