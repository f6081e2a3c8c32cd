"""Find an FFN or attention by its output projection: the rows of parameters that belong to its units.

The order of rows in a parameter is written as in `gprune.models.families.Place`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gprune.discovery.probe import Probe, Rows, common_module, is_linear, row_dim
from gprune.models.families import Place
from gprune.models.paths import is_norm, owner_of

NAMES_OF_COUNTS = re.compile("head|group|kv")  # in names of config keys with numbers of heads
ROLES = ("query", "key", "value")
# Attributes with these names are not updated by pruning, whatever their value is.
FIXED_PREFIXES = ("_", "num_key_value_groups", "layer_idx")


def ffn_place(probe: Probe, index: int, path: str, size: int, neuron: int, rows: Rows) -> Place | None:
    """Return the FFN or experts with an output projection, or None if they cannot be pruned by slicing.

    `path` is the name of the projection's weight, `size` its number of columns, and `rows` those of column `neuron`.
    """
    layer = probe.layers[index]
    order_of_rows = {
        (neuron,): "row",
        (neuron, neuron + size): "row | row",
        (2 * neuron, 2 * neuron + 1): "row row",
    }
    slices: dict[str, tuple[int, str]] = {}
    for (name, dim), indices in rows.items():
        order = order_of_rows.get(tuple(indices.tolist()))
        if order is None or layer.get_parameter(name).shape[dim] != size * len(indices) or name in slices:
            return None
        slices[name] = dim, order
    down = layer.get_parameter(path)
    weights = [name for name in slices if layer.get_parameter(name).dim() == down.dim()]
    if sum(slices[name][1].count("row") for name in weights) not in (1, 2):  # up, or gate and up
        return None
    if down.dim() == 3:
        reads = common_module([path, *slices])
        # The output of experts is linear in down. Without a gate, gradients do not distinguish up from down.
        if not reads or not probe.is_called(index, reads) or not probe.is_affine(
            down, lambda: probe.returned(index, reads), lambda weight: weight
        ):  # fmt: skip
            return None
        dim = next(d for d in (2, 1) if down.shape[d] != probe.hidden_size)
        modules = []
    else:
        reads, modules = owner_of(path), [owner_of(name) for name in weights]
        # Others are, for example, a norm over neurons, whose statistics change by pruning.
        is_of_linear = [is_linear(layer.get_submodule(owner_of(name))) and owner_of(name) in modules for name in slices]
        if not all(is_of_linear) or not probe.is_called(index, reads):
            return None
        slices = {name: slices[name] for name in weights}
        dim = 1 - row_dim(layer.get_submodule(reads))
    place = Place("neurons", reads, slices | {path: (dim, "row")}, settings={"intermediate_size": "neurons"})
    return complete_place(layer, place, modules, {size: "neurons"})


def attention_places(
    probe: Probe, path: str, projections: Mapping[int, tuple[Tensor, int]], size: int
) -> Iterator[tuple[int, Place]]:
    """Yield (number of a layer, attention) for an output projection with `size` columns.

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
            place = _attention_place(probe, index, path, size, width, rows, value_rows)
            if place is not None:
                del remaining[index]
                yield index, place


def _number_of_weight_rows(rows: Rows) -> int:
    """Return the number of rows, over all weights without biases."""
    return sum(len(indices) for (name, _), indices in rows.items() if name.endswith("weight"))


def _attention_place(
    probe: Probe, index: int, path: str, size: int, width: int, rows: Rows,
    value_rows: Mapping[tuple[str, int], set[int]],
) -> Place | None:  # fmt: skip
    """Return the attention, from rows of its first KV group."""
    layer, output, groups = probe.layers[index], owner_of(path), size // width
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
    slices = {}
    own = {f"{host}.weight": roles[host] for host in chosen.values()}
    for (name, dim), indices in sorted(attention_rows.items(), key=lambda item: item[0][0] not in own):
        if owner_of(name) in linear and name.endswith(".bias") and f"{owner_of(name)}.weight" in slices:
            continue  # sliced with the weight
        length = layer.get_parameter(name).shape[dim]
        order = _order_of_parts(indices.tolist(), own.get(name, ["row"] * len(indices)), groups, length)
        if order is None:
            return None
        slices[name] = dim, order
    if chosen["query"] != chosen["key"]:
        for role in ("query", "key"):
            outputs = linear[chosen[role]].weight.shape[row_dim(linear[chosen[role]])]
            for name in slices.keys() - own.keys():
                if _is_norm_over_heads(layer, name, outputs, role):
                    slices[name] = slices[name][0], "norm"
    head_dim = roles[chosen["value"]].count("value")
    place = Place(
        "kv_groups", output, slices | {path: (1 - row_dim(linear[output]), "row")},
        head_dim=_head_dim_attribute(layer, owner_of(output), head_dim),
        settings={"num_attention_heads": "heads", "num_key_value_heads": "kv_groups"},
    )  # fmt: skip
    # If sizes are equal, the last meaning is used.
    sizes = {size: "channels", groups * head_dim: "kv_channels", groups: "kv_groups", size // head_dim: "heads"}
    return complete_place(layer, place, [chosen["value"]], sizes)


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


def _is_norm_over_heads(layer: nn.Module, name: str, length: int, role: str) -> bool:
    """Return whether a parameter is the weight of a norm over all heads of query or key."""
    path, _, attribute = name.rpartition(".")
    is_over_all = attribute == "weight" and layer.get_parameter(name).shape == (length,)
    return is_over_all and is_norm(layer.get_submodule(path)) and path.rpartition(".")[2].startswith(role[0])


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


def _head_dim_attribute(layer: nn.Module, owner: str, head_dim: int) -> str:
    """Return the path of the attribute with the size of a value head; empty without one.

    Among several attributes with this value, `v_head_dim` is preferred, then `head_dim`, then the first by name.
    """
    attributes = vars(layer.get_submodule(owner))
    names = [
        name for name, value in attributes.items()
        if type(value) is int and value == head_dim and "head" in name and "num" not in name
    ]  # fmt: skip
    names.sort(key=lambda name: (name != "v_head_dim", name != "head_dim", name))
    return f"{owner}.{names[0]}".lstrip(".") if names else ""


def complete_place(layer: nn.Module, place: Place, modules: Sequence[str], sizes: Mapping[int, str]) -> Place:
    """Add attributes with sizes, and classes of modules to a place. `sizes` maps a number to its meaning."""
    is_of_experts = not is_linear(layer.get_submodule(place.reads))
    owner = place.reads if is_of_experts else owner_of(place.reads)
    paths = [path for path in (*modules, place.reads, owner) if path]
    if not owner:
        paths.append("")  # the layer itself
    classes = {path: type(layer.get_submodule(path)).__name__ for path in dict.fromkeys(paths)}
    attributes = {}
    for path, module in layer.get_submodule(owner).named_modules():
        if is_linear(module):
            continue
        for name, value in vars(module).items():
            is_fixed = name.startswith(FIXED_PREFIXES) or "hidden_size" in name
            if type(value) is int and value in sizes and not is_fixed:
                attributes[".".join(part for part in (owner, path, name) if part)] = sizes[value]
    return replace(place, classes=classes, attributes=attributes)
