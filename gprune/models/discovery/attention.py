"""Find attention by its output projection: KV groups, and the rows of parameters that belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gprune.models.discovery.probe import Probe, Rows, is_linear, is_norm, owner_of, row_dim
from gprune.models.discovery.surroundings import complete_kind

NAMES_OF_COUNTS = re.compile("head|group|kv")  # in names of config keys with numbers of heads
ROLES = ("query", "key", "value")


def attention_kinds(
    probe: Probe, path: str, projections: Mapping[int, tuple[Tensor, int]], size: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number of a layer, kind of attention) for an output projection.

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
