"""Find an FFN or attention by its output projection: the rows of parameters that belong to its units.

The order of rows in a parameter is written as in `Family.layout`: `up` or `gate` (one part), `gate | up` (all rows of
gate, then all of up) or `gate up` (neuron by neuron). A `row_orders` dictionary maps the name of a parameter in the
layer to its dimension of rows and their order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gprune.discovery.probe import (
    Probe,
    Rows,
    common_module,
    is_linear,
    norm_before,
    owner_of,
    row_dim,
)
from gprune.models.parts import is_norm, names_in

NAMES_OF_COUNTS = re.compile("head|group|kv")  # in names of config keys with numbers of heads
ROLES = ("query", "key", "value")
# Attributes with these names are not updated by pruning, whatever their value is.
FIXED_PREFIXES = ("_", "num_key_value_groups", "layer_idx")


def ffn_kind(probe: Probe, index: int, path: str, size: int, neuron: int, rows: Rows) -> dict[str, Any] | None:
    """Return the kind of FFN with an output projection, or None if it cannot be pruned by slicing.

    `path` is the name of the projection's weight, `size` its number of columns, and `rows` those of column `neuron`.
    """
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
    """Return the kind of experts with projections stacked in tensors (E, n, H) or (E, H, n).

    None if the module of the experts is not called, its output is not linear in the down projection `path`, or gate and
    up cannot be told apart.
    """
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
        # Biases were not tested: a fused one (`gate | up`) has the order of the fused weight, another keeps its own.
        default_order = fused_order if " " in order else order
        expert_rows[name.removeprefix(f"{experts}.")] = [dim, orders.get(name, default_order)]
    dim = next(d for d in (2, 1) if down.shape[d] != probe.hidden_size)
    kind = {"experts": experts, "expert_rows": expert_rows, "expert_down": [path.removeprefix(f"{experts}."), dim]}
    return complete_kind(probe, index, kind, "ffn", [experts], experts, {down.shape[dim]: "neurons"})


def _tell_gate_from_up(
    probe: Probe, index: int, weights: dict[str, tuple[int, str]], measure: Callable[[], Tensor]
) -> dict[str, str] | None:
    """Return the true order of parts in each weight, or None if it cannot be found.

    `measure()` returns neurons, or the output of the experts, which are linear in up, but not in gate.
    """
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


def attention_kinds(
    probe: Probe, path: str, projections: Mapping[int, tuple[Tensor, int]], size: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number of a layer, kind of attention) for an output projection with `size` columns.

    A KV group is the smallest group of columns for which rows of query, key and value vanish. With fewer columns only
    rows of value vanish.
    """
    remaining = dict(projections)
    counts = {
        value for name, value in probe.config.to_dict().items()
        if type(value) is int and NAMES_OF_COUNTS.search(name) and "dim" not in name
    }  # fmt: skip
    group_widths = [size // n for n in sorted(counts, reverse=True) if 1 < n < size and size % n == 0]
    for width in group_widths:  # smallest first
        vanished = probe.vanishing(remaining, torch.arange(width), path) if remaining else {}
        # Value alone has at most `width` rows, so more rows are also of query or key.
        complete = {index: rows for index, rows in vanished.items() if _number_of_weight_rows(rows) > width}
        if not complete:
            continue
        # If all columns of the group except one are zero, rows of value for these columns vanish, but no rows of query
        # and key. Two choices of the remaining column together give all rows of value.
        of_complete = {index: remaining[index] for index in complete}
        without_first = probe.vanishing(of_complete, torch.arange(1, width), path)
        without_last = probe.vanishing(of_complete, torch.arange(width - 1), path)
        for index, rows in complete.items():
            value_rows = {}
            for key in rows:
                indices = [*without_first[index].get(key, ()), *without_last[index].get(key, ())]
                value_rows[key] = {int(row) for row in indices}
            kind = _attention_kind(probe, index, path, size, width, rows, value_rows)
            if kind is not None:
                del remaining[index]
                yield index, kind


def _number_of_weight_rows(rows: Rows) -> int:
    """Return the number of rows, over all weights without biases."""
    return sum(len(indices) for (name, _), indices in rows.items() if name.endswith("weight"))


def _attention_kind(
    probe: Probe, index: int, path: str, size: int, width: int, rows: Rows,
    value_rows: Mapping[tuple[str, int], set[int]],
) -> dict[str, Any] | None:  # fmt: skip
    """Return the kind of attention, from rows of its first KV group."""
    layer = probe.layers[index]
    output = owner_of(path)
    groups = size // width
    linear = {module_path: module for module_path, module in layer.named_modules() if is_linear(module)}
    owners = dict.fromkeys(owner_of(name) for name, _ in rows)
    query_rows = _rows_of_own_token(probe, index, output, [owner for owner in owners if owner in linear])
    # Ignore other rows, such as those of an FFN neuron that no longer fires for any token.
    attention_rows = {
        (name, dim): indices for (name, dim), indices in rows.items()
        if owner_of(name) not in linear or owner_of(name) in query_rows
    }  # fmt: skip
    hosts = {}  # path of a linear layer -> rows of its weight
    for host in query_rows:
        key = f"{host}.weight", row_dim(linear[host])
        if key in attention_rows:
            hosts[host] = attention_rows[key]
    roles = {}  # path of a linear layer -> role of each of these rows
    for host, indices in hosts.items():
        of_value = value_rows[f"{host}.weight", row_dim(linear[host])]
        roles[host] = [_role(row, query_rows[host], of_value) for row in indices.tolist()]
    chosen = _choose_hosts(hosts, roles)
    if chosen is None:
        return None
    layout = _layout_of_hosts(layer, hosts, roles, chosen, groups)
    extras = _other_parameters(layer, attention_rows, chosen, groups)
    if layout is None or extras is None:
        return None
    kind: dict[str, Any] = {**chosen, "output": output}
    if layout:
        kind["layout"] = layout
    kind["extras"] = extras
    if chosen["query"] != chosen["key"]:
        for role in ("query", "key"):
            norm = _norm_over_heads(layer, kind["extras"], _number_of_outputs(layer, chosen[role]), role)
            if norm is not None:
                kind["extras"].pop(f"{norm}.weight")
                kind[f"{role}_norm"] = norm
    head_dim = roles[chosen["value"]].count("value")
    kind["head_dim"] = _head_dim_attribute(layer, owner_of(output), head_dim)
    # If sizes are equal, the last meaning is used.
    sizes = {size: "channels", groups * head_dim: "kv_channels", groups: "kv_groups", size // head_dim: "heads"}
    return complete_kind(probe, index, kind, "attention", [chosen["value"]], output, sizes)


def _role(row: int, query_rows: set[int], value_rows: set[int]) -> str:
    """Return whether a row belongs to query, key or value."""
    if row in query_rows:
        return "query"
    return "value" if row in value_rows else "key"


def _choose_hosts(hosts: Mapping[str, Tensor], roles: Mapping[str, Sequence[str]]) -> dict[str, str] | None:
    """Return {role: path of its linear layer}, or None unless there are a query, one key and one value.

    A gate of the attention output also depends on its own token only. The query has a q in its name, or is larger.
    """
    by_role = {role: [host for host in hosts if role in roles[host]] for role in ROLES}
    if not by_role["query"] or len(by_role["key"]) != 1 or len(by_role["value"]) != 1:
        return None
    by_role["query"].sort(key=lambda host: ("q" not in host.rpartition(".")[2], -len(hosts[host])))
    return {role: by_role[role][0] for role in ROLES}


def _layout_of_hosts(
    layer: nn.Module, hosts: Mapping[str, Tensor], roles: Mapping[str, Sequence[str]], chosen: Mapping[str, str],
    groups: int,
) -> dict[str, str] | None:  # fmt: skip
    """Return the order of parts in each fused linear layer, as in `Family.layout`; None if an order is unknown.

    The default, `query | key | value` in one linear layer, is omitted.
    """
    layout = {}
    for host in dict.fromkeys(chosen.values()):
        order = _order_of_parts(hosts[host].tolist(), roles[host], groups, _number_of_outputs(layer, host))
        if order is None:
            return None
        is_default = chosen["query"] == chosen["key"] == host and order == "query | key | value"
        if " " in order and not is_default:
            layout[host] = order
    return layout


def _other_parameters(
    layer: nn.Module, rows: Rows, chosen: Mapping[str, str], groups: int
) -> dict[str, list[Any]] | None:
    """Return parameters with rows of KV groups that are not in the chosen linear layers, as in `Family.extras`.

    Returns None if the order of their rows is unknown.
    """
    known = {f"{host}.{suffix}" for host in chosen.values() for suffix in ("weight", "bias")}
    extras = {}
    for (name, dim), indices in rows.items():
        if name not in known:
            no_roles = [""] * len(indices)
            if _order_of_parts(indices.tolist(), no_roles, groups, layer.get_parameter(name).shape[dim]) is None:
                return None
            extras[name] = [dim, "attention"]
    return extras


def _number_of_outputs(layer: nn.Module, host: str) -> int:
    """Return the number of outputs of a linear layer."""
    module = layer.get_submodule(host)
    return module.weight.shape[row_dim(module)]


def _order_of_parts(indices: Sequence[int], roles: Sequence[str], groups: int, length: int) -> str | None:
    """Return the order of parts in a parameter, from rows of its first KV group and their roles."""
    runs: list[tuple[str, int, int]] = []  # consecutive rows of a role: role, first row, length
    for row, role in zip(indices, roles, strict=True):
        if runs:
            last_role, first, run_length = runs[-1]
            if last_role == role and first + run_length == row:
                runs[-1] = (role, first, run_length + 1)
                continue
        runs.append((role, row, 1))
    names = [role for role, _, _ in runs]
    if len(set(names)) != len(names) or len(indices) * groups != length:
        return None
    if list(indices) == list(range(len(indices))):  # all parts of the first group, then those of the second
        return " ".join(names)
    # All groups of the first part, then all of the second: a part begins after all rows of the previous parts.
    starts = [sum(run_length for _, _, run_length in runs[:position]) * groups for position in range(len(runs))]
    return " | ".join(names) if [first for _, first, _ in runs] == starts else None


def _norm_over_heads(layer: nn.Module, extras: Mapping[str, Any], length: int, role: str) -> str | None:
    """Return the path of a norm over all heads of query or key, or None."""
    for name in extras:
        path, _, attribute = name.rpartition(".")
        is_over_all = attribute == "weight" and layer.get_parameter(name).shape == (length,)
        if is_over_all and is_norm(layer.get_submodule(path)) and path.rpartition(".")[2].startswith(role[0]):
            return path
    return None


def _rows_of_own_token(probe: Probe, index: int, output: str, hosts: Sequence[str]) -> dict[str, set[int]]:
    """Return for each module which of its outputs affect attention only at their own token, as those of queries do.

    They are outputs at earlier tokens without a gradient of the attention output at the last token. Modules without any
    gradient are omitted.
    """
    calls = probe.in_layer(index, [*hosts, output], gradients=True)
    # The last call of each module: recurrent types may compute earlier ones without gradients.
    last_calls = {call.path: call for call in calls}
    B, T = probe.ids.shape
    if output not in last_calls or not last_calls[output].entering.requires_grad:
        return {}
    at_last_token = last_calls[output].entering.reshape(B, T, -1)[:, -1]
    returned = {
        host: last_calls[host].returned for host in hosts
        if host in last_calls and last_calls[host].returned.requires_grad
    }  # fmt: skip
    if not returned:
        return {}
    gradients = torch.autograd.grad(at_last_token.square().sum(), list(returned.values()), allow_unused=True)
    rows = {}
    for host, gradient in zip(returned, gradients, strict=True):
        if gradient is not None and gradient.numel() % (B * T) == 0:
            at_earlier_tokens = gradient.reshape(B, T, -1)[:, :-1].abs().amax((0, 1))
            rows[host] = set((at_earlier_tokens == 0).nonzero().flatten().tolist())
    return rows


def _head_dim_attribute(layer: nn.Module, owner: str, head_dim: int) -> str | None:
    """Return the path of the attribute with the size of a value head, or None.

    Among several attributes with this value, `v_head_dim` is preferred, then `head_dim`, then the first by name.
    """
    attributes = vars(layer.get_submodule(owner))
    names = [
        name for name, value in attributes.items()
        if type(value) is int and value == head_dim and "head" in name and "num" not in name
    ]  # fmt: skip
    names.sort(key=lambda name: (name != "v_head_dim", name != "head_dim", name))
    return f"{owner}.{names[0]}".lstrip(".") if names else None


def complete_kind(
    probe: Probe, index: int, kind: dict[str, Any], scope: str, hosts: Sequence[str], output: str,
    sizes: Mapping[int, str],
) -> dict[str, Any]:  # fmt: skip
    """Add norms, attributes with sizes, and classes of modules to a kind in place, and return it.

    `hosts` read the output of the norm before; `sizes` maps a number to its meaning in `Family.attributes`.
    """
    layer = probe.layers[index]
    owner = kind.get("experts") or owner_of(output)
    paths = [path for path in (*hosts, output, owner) if path]
    if not owner:
        paths.append("")  # the layer itself
    kind["classes"] = {path: type(layer.get_submodule(path)).__name__ for path in dict.fromkeys(paths)}
    kind[f"{scope}_norm"] = norm_before(probe, index, hosts[0])
    kind["attributes"] = {}
    for path, module in layer.get_submodule(owner).named_modules():
        if is_linear(module):
            continue
        for name, value in vars(module).items():
            is_fixed = name.startswith(FIXED_PREFIXES) or "hidden_size" in name
            if type(value) is int and value in sizes and not is_fixed:
                attribute = ".".join(part for part in (owner, path, name) if part)
                kind["attributes"][attribute] = sizes[value]
    return kind
