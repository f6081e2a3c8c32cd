"""Find an FFN by its output projection: the rows of parameters that belong to its neurons.

The order of rows in a parameter is written as in `Family.layout`: `up` or `gate` (one part), `gate | up` (all rows of
gate, then all of up) or `gate up` (neuron by neuron). A `row_orders` dictionary maps the name of a parameter in the
layer to its dimension of rows and their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gprune.models.discovery.probe import Probe, Rows, common_module, is_linear, owner_of, row_dim
from gprune.models.discovery.surroundings import complete_kind
from gprune.models.parts import names_in


def ffn_kind(probe: Probe, index: int, path: str, size: int, neuron: int, rows: Rows) -> dict[str, Any] | None:
    """Return the kind of FFN with an output projection, or None if the order of its rows is unknown."""
    layer = probe.layers[index]
    order_of_rows = {
        (neuron,): "up",
        (neuron, neuron + size): "gate | up",
        (2 * neuron, 2 * neuron + 1): "gate up",
    }
    row_orders: dict[str, tuple[int, str]] = {}
    for (name, dim), indices in rows.items():
        order = order_of_rows.get(tuple(indices.tolist()))
        if order is None or layer.get_parameter(name).shape[dim] != size * len(indices) or name in row_orders:
            return None
        row_orders[name] = dim, order
    is_stacked = layer.get_parameter(path).dim() == 3
    return (_experts_kind if is_stacked else _dense_kind)(probe, index, path, row_orders)


def _dense_kind(probe: Probe, index: int, path: str, row_orders: dict[str, tuple[int, str]]) -> dict[str, Any] | None:
    """Return the kind of an FFN of linear layers, or None if it cannot be pruned by slicing these layers."""
    layer = probe.layers[index]
    down = owner_of(path)
    hosts = [
        owner_of(name) for name in row_orders
        if name.endswith(".weight") and is_linear(layer.get_submodule(owner_of(name)))
    ]  # fmt: skip
    if not probe.is_called(index, down):
        return None
    if any(owner_of(name) not in hosts for name in row_orders):
        return None  # such as a norm over neurons, whose statistics change by pruning
    weights = {f"{host}.weight": row_orders[f"{host}.weight"] for host in hosts}
    orders = _tell_gate_from_up(probe, index, weights, lambda: probe.entering(index, down))
    if orders is None:
        return None
    host_of_part = {part: owner_of(name) for name, order in orders.items() for part in names_in(order)}
    kind: dict[str, Any] = {"down": down, "up": host_of_part["up"], "gate": host_of_part.get("gate")}
    # `gate | up` is the default for gate and up in one module.
    layout = {owner_of(name): order for name, order in orders.items() if order not in ("gate", "up", "gate | up")}
    if layout:
        kind["layout"] = layout
    columns = 1 - row_dim(layer.get_submodule(down))
    neurons = layer.get_parameter(path).shape[columns]
    return complete_kind(probe, index, kind, "ffn", hosts, down, {neurons: "neurons"})


def _experts_kind(probe: Probe, index: int, path: str, row_orders: dict[str, tuple[int, str]]) -> dict[str, Any] | None:
    """Return the kind of experts with projections stacked in tensors (E, n, H) or (E, H, n), or None."""
    layer = probe.layers[index]
    experts = common_module([path, *row_orders])
    if not experts or not probe.is_called(index, experts):
        return None

    def experts_output() -> Tensor:
        return probe.returned(index, experts)

    down = layer.get_parameter(path)
    # Without a gate, gradients do not distinguish up from down, but the output is linear only in down.
    if not probe.is_affine(down, experts_output, lambda weight: weight):
        return None
    weights = {name: row_order for name, row_order in row_orders.items() if layer.get_parameter(name).dim() == 3}
    orders = _tell_gate_from_up(probe, index, weights, experts_output)
    if orders is None:
        return None
    fused_order = next((order for order in orders.values() if order not in ("gate", "up")), None)
    expert_rows = {}
    for name, (dim, order) in row_orders.items():
        default_order = fused_order if " " in order else order  # for a bias, which is not in `orders`
        expert_rows[name.removeprefix(f"{experts}.")] = [dim, orders.get(name, default_order)]
    dim = next(d for d in (2, 1) if down.shape[d] != probe.hidden_size)
    kind = {"experts": experts, "expert_rows": expert_rows, "expert_down": [path.removeprefix(f"{experts}."), dim]}
    return complete_kind(probe, index, kind, "ffn", [experts], experts, {down.shape[dim]: "neurons"})


def _tell_gate_from_up(
    probe: Probe, index: int, weights: dict[str, tuple[int, str]], measure: Callable[[], Tensor]
) -> dict[str, str] | None:
    """Return the true order of parts in each weight. Neurons are linear in up, but not in gate."""
    layer = probe.layers[index]

    def is_linear_in(name: str, part: Callable[[Tensor], Tensor] = lambda weight: weight) -> bool:
        return probe.is_affine(layer.get_parameter(name), measure, part)

    if len(weights) == 2 and all(order == "up" for _, order in weights.values()):
        up = next((name for name in weights if is_linear_in(name)), None)
        return None if up is None else {name: "up" if name == up else "gate" for name in weights}
    if len(weights) != 1:
        return None
    ((name, (dim, order)),) = weights.items()
    if order == "up":
        return {name: order}
    exchanged = " ".join(reversed(order.split(" ")))
    # Up is second in `order`, and first in `exchanged`.
    if is_linear_in(name, lambda weight: _half(weight, order, dim, 1)):
        return {name: order}
    if is_linear_in(name, lambda weight: _half(weight, order, dim, 0)):
        return {name: exchanged}
    return None


def _half(tensor: Tensor, order: str, dim: int, half: int) -> Tensor:
    """Return a view of the first (0) or second (1) part of a fused tensor, whose rows are along `dim`."""
    if "|" in order:
        return tensor.chunk(2, dim=dim)[half]
    return tensor.unflatten(dim, (-1, 2)).select(dim + 1, half)
