"""Find attention by its output projection: KV groups, and the rows of parameters that belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gprune.models.discovery.probe import Probe, Rows, is_linear, is_norm, owner_of, row_dim
from gprune.models.discovery.surroundings import completed

COUNT = re.compile("head|group|kv")  # in names of config keys with numbers of heads
ROLES = ("query", "key", "value")


def attention_kinds(
    probe: Probe, path: str, places: Mapping[int, tuple[Tensor, int]], size: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number of a layer, kind of attention) for an output projection.

    A KV group is the smallest group of columns for which rows of query, key and value vanish. With fewer columns only
    rows of value vanish.

    Args:
        probe: the tiny model.
        path: path of the output projection in a layer.
        places: number of a layer -> the projection and its dimension of columns.
        size: number of columns.
    """
    left, numbers = dict(places), probe.config.to_dict().items()
    counts = {n for name, n in numbers if type(n) is int and COUNT.search(name) and "dim" not in name}
    for width in (size // n for n in sorted(counts, reverse=True) if 1 < n < size and size % n == 0):
        found = probe.vanishing(left, torch.arange(width), path) if left else {}
        likely = {
            index: rows for index, rows in found.items()
            if sum(len(r) for (name, _), r in rows.items() if name.endswith("weight")) > width
        }  # fmt: skip
        if not likely:
            continue
        own = {index: left[index] for index in likely}
        fewer = [probe.vanishing(own, columns, path) for columns in (torch.arange(1, width), torch.arange(width - 1))]
        for index, rows in likely.items():
            values = {key: {int(row) for part in fewer for row in part[index].get(key, ())} for key in rows}
            if (kind := _kind(probe, index, path, size, width, rows, values)) is not None:
                del left[index]
                yield index, kind


def _kind(
    probe: Probe, index: int, path: str, size: int, width: int, rows: Rows, values: Mapping[tuple[str, int], set[int]]
) -> dict[str, Any] | None:
    """Return the kind of attention, from rows of its first KV group.

    Returns None if there are no rows of query, key or value, or their order is unknown.
    """
    layer, output, groups = probe.layers[index], owner_of(path), size // width
    linear = {path: module for path, module in layer.named_modules() if is_linear(module)}
    owners = dict.fromkeys(owner_of(name) for name, _ in rows)
    local = _rows_of_own_token(probe, index, output, [path for path in owners if path in linear])
    # Ignore other rows, such as those of an FFN neuron that no longer fires for any token.
    rows = {key: r for key, r in rows.items() if (owner := owner_of(key[0])) not in linear or owner in local}
    hosts = {path: rows[key] for path in local if (key := (f"{path}.weight", row_dim(linear[path]))) in rows}
    roles: dict[str, list[str]] = {}
    for host, found in hosts.items():
        of_value = values[f"{host}.weight", row_dim(layer.get_submodule(host))]
        roles[host] = [
            "query" if row in local[host] else "value" if row in of_value else "key" for row in found.tolist()
        ]
    by_role = {role: [host for host in hosts if role in roles[host]] for role in ROLES}
    if not by_role["query"] or len(by_role["key"]) != 1 or len(by_role["value"]) != 1:
        return None
    # A gate of the attention output also depends on its own token only. Query has a q in its name, or is larger.
    by_role["query"].sort(key=lambda host: ("q" not in host.rpartition(".")[2], -len(hosts[host])))
    chosen = {role: by_role[role][0] for role in ROLES}
    layout = {}
    for host in dict.fromkeys(chosen.values()):
        order = _order(hosts[host].tolist(), roles[host], groups, _rows(layer, host))
        if order is None:
            return None
        whole = chosen["query"] == chosen["key"] == host and order == "query | key | value"
        if " " in order and not whole:
            layout[host] = order
    kind: dict[str, Any] = chosen | {"output": output} | ({"layout": layout} if layout else {}) | {"extras": {}}
    known = {f"{host}.{part}" for host in chosen.values() for part in ("weight", "bias")}
    for (name, dim), found in rows.items():
        if name not in known:
            if _order(found.tolist(), [""] * len(found), groups, layer.get_parameter(name).shape[dim]) is None:
                return None
            kind["extras"][name] = [dim, "attention"]
    for role in ("query", "key") if chosen["query"] != chosen["key"] else ():
        if (norm := _norm_over_heads(layer, kind["extras"], _rows(layer, chosen[role]), role)) is not None:
            kind["extras"].pop(f"{norm}.weight")
            kind[f"{role}_norm"] = norm
    d = roles[chosen["value"]].count("value")
    kind["head_dim"] = _head_dim(layer, owner_of(output), d)
    sizes = {size: "channels", groups * d: "kv_channels"} | {groups: "kv_groups"} | {size // d: "heads"}
    return completed(probe, index, kind, "attention", [chosen["value"]], output, sizes)


def _rows(layer: nn.Module, host: str) -> int:
    """Return the number of outputs of a linear layer."""
    module = layer.get_submodule(host)
    return module.weight.shape[row_dim(module)]


def _order(found: Sequence[int], roles: Sequence[str], groups: int, length: int) -> str | None:
    """Return the order of parts in a parameter, from rows of its first KV group and their roles.

    The order is `query | key | value`, `query key value`, or a single part; None for any other order.
    """
    runs: list[tuple[str, int, int]] = []  # role, first row, length
    for row, role in zip(found, roles, strict=True):
        if runs and runs[-1][0] == role and runs[-1][1] + runs[-1][2] == row:
            runs[-1] = (role, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((role, row, 1))
    names = [role for role, _, _ in runs]
    if len(set(names)) != len(names) or len(found) * groups != length:
        return None
    if list(found) == list(range(len(found))):
        return " ".join(names)
    starts = [sum(n for _, _, n in runs[:place]) * groups for place in range(len(runs))]
    return " | ".join(names) if [start for _, start, _ in runs] == starts else None


def _norm_over_heads(layer: nn.Module, extras: Mapping[str, Any], length: int, role: str) -> str | None:
    """Return the path of a norm over all heads whose weight is in `extras`, or None."""
    for name in extras:
        path, _, own = name.rpartition(".")
        over_all = own == "weight" and layer.get_parameter(name).shape == (length,)
        if over_all and is_norm(layer.get_submodule(path)) and path.rpartition(".")[2].startswith(role[0]):
            return path
    return None


def _rows_of_own_token(probe: Probe, index: int, output: str, hosts: Sequence[str]) -> dict[str, set[int]]:
    """Return for each module which of its outputs affect attention only at their own token, as those of queries do."""
    calls = probe.in_layer(index, [*hosts, output], gradients=True)
    seen = {call.path: call for call in calls}  # last calls: recurrent types may compute earlier ones without gradients
    B, T = probe.ids.shape
    if output not in seen or not seen[output].entering.requires_grad:
        return {}
    last = seen[output].entering.reshape(B, T, -1)[:, -1]
    returned = {host: seen[host].returned for host in hosts if host in seen and seen[host].returned.requires_grad}
    gradients = torch.autograd.grad(last.square().sum(), list(returned.values()), allow_unused=True) if returned else ()
    found = {}
    for host, gradient in zip(returned, gradients, strict=True):
        if gradient is not None and gradient.numel() % (B * T) == 0:
            others = gradient.reshape(B, T, -1)[:, :-1].abs().amax((0, 1))
            found[host] = set((others == 0).nonzero().flatten().tolist())
    return found


def _head_dim(layer: nn.Module, owner: str, size: int) -> str | None:
    """Return the path of the attribute with the size of a value head, or None."""
    attributes = vars(layer.get_submodule(owner)).items()
    names = [n for n, v in attributes if type(v) is int and v == size and "head" in n and "num" not in n]
    names.sort(key=lambda n: (n != "v_head_dim", n != "head_dim", n))
    return f"{owner}.{names[0]}".lstrip(".") if names else None
