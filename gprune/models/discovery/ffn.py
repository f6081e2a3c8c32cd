"""Find an FFN by its output projection: the rows of parameters that belong to its neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gprune.models.discovery.probe import Probe, Rows, common_module, is_linear, owner_of, row_dim
from gprune.models.discovery.surroundings import completed


def ffn_kind(probe: Probe, index: int, path: str, size: int, neuron: int, rows: Rows) -> dict[str, Any] | None:
    """Return the kind of FFN with an output projection, or None if the order of its rows is unknown.

    Args:
        probe: the tiny model.
        index: number of the layer.
        path: path of the output projection in the layer.
        size: number of neurons.
        neuron: one of the neurons.
        rows: rows of parameters that belong to this neuron.
    """
    layer, layouts, j = probe.layers[index], {}, neuron
    orders = {(j,): "up", (j, j + size): "gate | up", (2 * j, 2 * j + 1): "gate up"}
    for (name, dim), found in rows.items():
        order = orders.get(tuple(found.tolist()))
        if order is None or layer.get_parameter(name).shape[dim] != size * len(found) or name in layouts:
            return None
        layouts[name] = dim, order
    stacked = layer.get_parameter(path).dim() == 3
    return (_experts if stacked else _dense)(probe, index, path, layouts)


def _dense(probe: Probe, index: int, path: str, layouts: dict[str, tuple[int, str]]) -> dict[str, Any] | None:
    """Return the kind of an FFN of linear layers, or None."""
    layer, down = probe.layers[index], owner_of(path)
    hosts = [owner_of(n) for n in layouts if n.endswith(".weight") and is_linear(layer.get_submodule(owner_of(n)))]
    if not probe.is_called(index, down) or any(owner_of(name) not in hosts for name in layouts):
        return None  # second condition: a norm over neurons, whose statistics change by pruning
    weights = {f"{host}.weight": layouts[f"{host}.weight"] for host in hosts}
    if (roles := _roles(probe, index, weights, lambda: probe.entering(index, down))) is None:
        return None
    where = {part: owner_of(name) for name, order in roles.items() for part in order.replace("|", " ").split()}
    kind = {"down": down, "up": where["up"], "gate": where.get("gate")}
    fused = {owner_of(name): order for name, order in roles.items() if order not in ("gate", "up", "gate | up")}
    kind |= {"layout": fused} if fused else {}
    return completed(probe, index, kind, "ffn", hosts, down, {layer.get_parameter(path).shape[1 - row_dim(
        layer.get_submodule(down))]: "neurons"})  # fmt: skip


def _experts(probe: Probe, index: int, path: str, layouts: dict[str, tuple[int, str]]) -> dict[str, Any] | None:
    """Return the kind of experts with projections stacked in tensors (E, n, H) or (E, H, n), or None."""
    layer = probe.layers[index]
    if not (experts := common_module([path, *layouts])) or not probe.is_called(index, experts):
        return None

    def output() -> Tensor:
        return probe.returned(index, experts)

    down = layer.get_parameter(path)
    # Without a gate, gradients do not distinguish up from down, but the output is linear only in down.
    if not probe.is_affine(down, output, lambda weight: weight):
        return None
    weights = {name: place for name, place in layouts.items() if layer.get_parameter(name).dim() == 3}
    if (roles := _roles(probe, index, weights, output)) is None:
        return None
    fused = next((order for order in roles.values() if order not in ("gate", "up")), None)
    rows = {
        name.removeprefix(f"{experts}."): [dim, roles.get(name, fused if " " in order else order)]
        for name, (dim, order) in layouts.items()
    }
    dim = next(d for d in (2, 1) if down.shape[d] != probe.hidden_size)
    kind = {"experts": experts, "expert_rows": rows, "expert_down": [path.removeprefix(f"{experts}."), dim]}
    return completed(probe, index, kind, "ffn", [experts], experts, {down.shape[dim]: "neurons"})


def _roles(
    probe: Probe, index: int, weights: dict[str, tuple[int, str]], measure: Callable[[], Tensor]
) -> dict[str, str] | None:
    """Return the parts in each weight, in order. Neurons are linear in up but not in gate. None if in neither."""
    layer = probe.layers[index]

    def linear(name: str, part: Callable[[Tensor], Tensor] = lambda weight: weight) -> bool:
        return probe.is_affine(layer.get_parameter(name), measure, part)

    if len(weights) == 2 and all(order == "up" for _, order in weights.values()):
        names = list(weights)
        up = next((name for name in names if linear(name)), None)
        return None if up is None else {name: "up" if name == up else "gate" for name in names}
    if len(weights) != 1:
        return None
    ((name, (dim, order)),) = weights.items()
    if order == "up":
        return {name: order}
    halves = order, " ".join(reversed(order.split(" ")))  # the same rows with gate and up exchanged
    for second, found in zip((1, 0), halves, strict=True):
        if linear(name, lambda weight, second=second: _half(weight, order, dim, second)):
            return {name: found}
    return None


def _half(tensor: Tensor, layout: str, dim: int, which: int) -> Tensor:
    """Return a view of the first (0) or second (1) part of a fused tensor."""
    if "|" in layout:
        return tensor.chunk(2, dim=dim)[which]
    return tensor.unflatten(dim, (-1, 2)).select(dim + 1, which)
