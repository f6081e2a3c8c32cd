"""The units of a model: which indices of its tensors belong to each neuron, KV group and expert."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.errors import UserError
from gprune.models.experts import router_needs
from gprune.models.families import Place, decoder_layers, record_of
from gprune.models.modeling_pruned import find_parent
from gprune.models.offload import load_parameter
from gprune.models.paths import attribute_at, owner_of
from gprune.models.products import PRODUCT_MODULES
from gprune.units.structure import KINDS, Slice, Units, unit_key

REMEDY = (
    "Write a function that returns its units in a file that --import names (docs/extend.md, 'A model type'), or choose "
    "a type in docs/architectures.md"
)
# Model type -> a function of a user that returns units of a model: further ones of a kind of its own, or neurons and KV
# groups, which are then not searched for.
UNITS: dict[str, Callable[[PreTrainedModel], Sequence[Units]]] = {}


def units_of(model: PreTrainedModel) -> list[Units]:
    """Return the units of a model: each layer, and for each of its blocks the experts, KV groups and neurons.

    A block is an FFN and an attention of a layer, or one of them. Most layers are one block. A layer with several FFNs,
    such as experts and shared experts, has a block for each, and its attention is in the first one. There is one set of
    neurons and one of KV groups per block, which may be empty. Units of a user's own kind follow.

    Raises:
        UserError: if slices of the record, or of a function in `UNITS`, do not fit the model.
    """
    record, layers = record_of(model), decoder_layers(model)
    function = UNITS.get(record.model_type)
    of_user = [] if function is None else [_checked(u, layers[u.layer]) for u in function(model)]
    units: list[Units] = []
    for index, layer in enumerate(layers):
        number = sum(u.kind == "neurons" for u in units)
        places = [u for u in of_user if u.layer == index and u.kind in KINDS]
        try:
            places = places or places_in(layer, record.places)
            units += _units_of_layer(layer, index, number, places, model.config)
        except ValueError as misfit:
            why = "the structure of a tiny copy does not fit it: " if record.found else ""
            raise UserError(
                f"--model.name: layer {index} of this '{model.config.model_type}' model cannot be pruned: "
                f"{why}{misfit}. {REMEDY}."
            ) from misfit
    return [*units, *(u for u in of_user if u.kind not in KINDS)]


def units_by_layer(model: PreTrainedModel) -> list[list[Units]]:
    """Return the units of a model, without those of a user's own kind, by layer."""
    by_layer: list[list[Units]] = [[] for _ in decoder_layers(model)]
    for u in units_of(model):
        if u.kind in KINDS:
            by_layer[u.layer].append(u)
    return by_layer


def _units_of_layer(
    layer: nn.Module, index: int, number: int, places: Iterable[Place | Units], config: PreTrainedConfig
) -> list[Units]:
    """Return the units of a layer, from coarse to fine, at places or given by a user; `number` is its first block."""
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    units = [Units(unit_key("layer", index), "layer", index, count=1, parameters=parameters, least=0)]
    by_kind: dict[str, list[Place | Units]] = {"kv_groups": [], "neurons": []}
    for place in places:
        if isinstance(place, Units) or not place.stays:
            by_kind[place.kind].append(place)
    for block, of_kinds in enumerate(list(zip_longest(*by_kind.values())) or [(None, None)], number):
        for kind, place in zip(by_kind, of_kinds, strict=True):
            u = place if isinstance(place, Units) else units_at(layer, place, config)
            u = replace(u or Units("", kind, index, count=0), key=unit_key(kind, block), layer=index)
            if u.rows > 1:
                place = Place(kind, u.reads) if isinstance(place, Units) else place
                units.append(replace(_experts(layer, u, place, config), key=unit_key("experts", block)))
                u = replace(u, inside=units[-1].key)
            units.append(u)
    return [u if u.kind == "layer" else replace(u, parameters=unit_cost(u, layer)) for u in units]


def sizes_of_layer(units: Sequence[Units]) -> tuple[dict[str, int], dict[str, int]]:
    """Return sizes of a layer by key of the configuration, and by attribute of a module. The first block's are used."""
    settings: dict[str, int] = {}
    attributes: dict[str, int] = {}
    for u in reversed(units):
        settings |= {key: value * u.count for key, value in u.settings.items()}
        attributes |= {path: value * u.count for path, value in u.attributes.items()}
    return settings, attributes


def places_in(layer: nn.Module, places: Iterable[Place]) -> list[Place]:
    """Return the places in a layer, without the reason to stay for the first one of each kind, which is pruned.

    The first of several places with the same output projection is used.
    """
    found: dict[str, Place] = {}
    for place in places:
        if place.reads not in found and _has_place(layer, place):
            is_first = all(other.kind != place.kind for other in found.values())
            found[place.reads] = replace(place, stays="") if is_first else place
    return list(found.values())


def _has_place(layer: nn.Module, place: Place) -> bool:
    """Return whether a layer has the modules of a place, with the same names of classes.

    PyTorch's parametrizations replace the class by a subclass. The prefix that they add to its name is removed.
    """
    for path, class_name in place.classes.items():
        module = attribute_at(layer, path)
        if module is None or type(module).__name__.removeprefix("Parametrized") != class_name:
            return False
    return True


def unit_cost(u: Units, layer: nn.Module, weight: Callable[[Tensor], int] = lambda parameter: 1) -> int:
    """Return the number of parameters of a unit, each counted `weight(parameter)` times; of a layer all of them."""
    if u.kind == "layer":
        return sum(weight(parameter) * parameter.numel() for parameter in layer.parameters())
    cost = 0
    for s in u.slices:
        tensor = attribute_at(layer, s.path)
        if isinstance(tensor, nn.Parameter):  # buffers are not counted
            cost += weight(tensor) * (tensor.numel() // len(s.unit) * int((s.unit >= 0).sum()) // u.count)
    return cost


def units_at(layer: nn.Module, place: Place | None, config: PreTrainedConfig) -> Units | None:
    """Return the units at a place of a layer, without key and parameters; None without a place, or with width 0.

    Raises:
        ValueError: if tensors of the layer do not fit the place.
    """
    if place is None:
        return None
    sizes = {path: attribute_at(layer, path).shape for path in place.slices if attribute_at(layer, path) is not None}
    (*_, weight) = sizes  # that reads the units
    channels = count = sizes[weight][place.slices[weight][0]]
    if not channels:
        return None
    per_unit = {"neurons": 1}
    if place.kind == "kv_groups":
        head_dim = _head_dim(layer, place, config)
        value = next(path for path, (_, order) in place.slices.items() if "value" in order)
        rows = dict(_parts(place.slices[value][1], sizes[value][place.slices[value][0]], 1, channels))["value"]
        count = len(rows) // head_dim
        if not count or len(rows) % head_dim or channels % head_dim or channels % count:
            raise ValueError(
                f"{channels} attention channels and {len(rows)} value rows do not divide into heads of {head_dim}"
            )
        width = channels // count
        per_unit = {"kv_groups": 1, "kv_channels": head_dim, "channels": width, "heads": width // head_dim}
    slices: list[Slice] = []
    for path, shape in sizes.items():
        dim, order = place.slices[path]
        slices.append(_slice(path, dim, order, shape[dim], count, channels))
        module = layer.get_submodule(owner_of(path))
        if path != weight and isinstance(module, PRODUCT_MODULES) and module.bias is not None:
            slices.insert(-1, replace(slices[-1], path=f"{owner_of(path)}.bias", dim=0))
    return Units(
        "", place.kind, 0, count, slices=tuple(slices), inputs=tuple(_inputs(place, slices, sizes)), reads=place.reads,
        rows=sizes[weight][0] if len(sizes[weight]) == 3 else 1,
        attributes={path: per_unit[size] for path, size in place.attributes.items() if size in per_unit},
        settings={key: per_unit[size] for key, size in place.settings.items() if size in per_unit},
    )  # fmt: skip


def _inputs(place: Place, slices: Sequence[Slice], sizes: Mapping[str, Sequence[int]]) -> Iterator[Slice]:
    """Yield the rows that metrics read: those of all weights of an FFN but the last one, or of values."""
    for s in slices[:-1]:
        if len(sizes.get(s.path, ())) != len(sizes[slices[-1].path]):
            continue  # a bias or a norm
        if place.kind == "neurons":
            yield s
        for name, rows in s.parts:
            if name == "value":
                yield replace(s, unit=torch.full_like(s.unit, -1).index_copy(0, rows, s.unit[rows]))


def _slice(path: str, dim: int, order: str, rows: int, count: int, channels: int) -> Slice:
    """Return the slice of a tensor, in which the rows of each part are divided equally among the units, in order.

    Raises:
        ValueError: if the rows do not divide into the units.
    """
    parts = _parts(order, rows, count, channels)
    if sum(len(of_part) // max(1, count) for _, of_part in parts) * count != rows:
        raise ValueError(f"the {rows} rows of '{path}' do not divide into {count} units")
    unit = torch.empty(rows, dtype=torch.long)
    for _, of_part in parts:
        unit[of_part] = torch.arange(count).repeat_interleave(len(of_part) // max(1, count))
    return Slice(path, dim, unit, tuple(parts))


def _parts(order: str, rows: int, count: int, channels: int) -> list[tuple[str, Tensor]]:
    """Return the name and the row indices, by unit, of each part of a tensor with an order as in `Place`.

    Beside other parts, a query has as many rows as there are channels; the other parts share the remaining rows.
    """
    names = order.replace("|", " ").split()
    if len(names) == 1:
        return [(order, torch.arange(rows))]
    queries = names.count("query")
    others = (rows - queries * channels) // (len(names) - queries)
    parts: list[tuple[str, Tensor]] = []
    start = 0
    for segment in order.split("|"):
        per_unit = [(channels if name == "query" else others) // max(1, count) for name in segment.split()]
        end = start + count * sum(per_unit)
        by_unit = torch.arange(start, end).view(count, -1).split(per_unit, dim=1)
        parts += [(name, of_part.flatten()) for name, of_part in zip(segment.split(), by_unit, strict=True)]
        start = end
    return parts


def _head_dim(layer: nn.Module, place: Place, config: PreTrainedConfig) -> int:
    """Return the size of a value head of an attention."""
    of_layer = attribute_at(layer, place.head_dim) if place.head_dim else None
    config = config.get_text_config(decoder=True)
    # `or` is lazy on purpose: reading a global number of heads is an error if layers differ in it.
    return of_layer or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _experts(layer: nn.Module, neurons: Units, place: Place, config: PreTrainedConfig) -> Units:
    """Return the experts of neurons: their stacked tensors, the rows of the router, and what else has an index each."""
    slices = []
    for path, dim in {**dict.fromkeys((s.path for s in neurons.slices), 0), **place.per_expert}.items():
        if (tensor := attribute_at(layer, path)) is not None:  # a router may lack a bias
            numbers = torch.arange(tensor.shape[dim])  # indices after the last expert belong to none
            slices.append(Slice(path, dim, numbers.where(numbers < neurons.rows, -1)))
    why_not = "" if place.per_expert else place.whole_experts or "its router is unknown"
    groups, least, why_not = router_needs(neurons.rows, config, why_not)
    return Units(
        "", "experts", neurons.layer, neurons.rows, slices=tuple(slices), reads=neurons.reads, least=least, step=groups,
        attributes={path: 1 for path, size in place.attributes.items() if size == "experts"},
        settings={key: 1 for key, size in place.settings.items() if size == "experts"}, stays=why_not,
    )  # fmt: skip


def _checked(u: Units, layer: nn.Module) -> Units:
    """Return units of a user with their parameters. Raise UserError unless their slices fit the layer."""
    for s in (*u.slices, *u.inputs):
        tensor = attribute_at(layer, s.path)
        if not isinstance(tensor, Tensor):
            raise UserError(f"Units '{u.key}' must have tensors of layer {u.layer}; it has no '{s.path}'.")
        if tensor.shape[s.dim] != len(s.unit) or not -1 <= int(s.unit.min()) <= int(s.unit.max()) < u.count:
            raise UserError(
                f"Units '{u.key}' must have the unit, -1 to {u.count - 1}, of each of {tensor.shape[s.dim]} indices of "
                f"'{s.path}' along dimension {s.dim}; got {len(s.unit)}, from {s.unit.min()} to {s.unit.max()}."
            )
    return replace(u, parameters=unit_cost(u, layer))


# What is not pruned


@dataclass
class Unpruned:
    """An FFN, experts or attention that is not pruned."""

    why: str  # the reason
    layers: int = 0  # number of layers that have it
    parameters: int = 0  # parameters of its units or modules, over all these layers


def find_unpruned(model: PreTrainedModel) -> dict[str, Unpruned]:
    """Return FFNs and attentions that are not pruned, by path of the output.

    They are those next to a larger one of their layer, if the record says so, and refused FFNs.
    """
    family, layers = record_of(model), decoder_layers(model)
    by_output: dict[str, Unpruned] = {}
    sliced = {id(attribute_at(layers[u.layer], s.path)) for u in units_of(model) for s in u.slices}
    for layer in layers:
        places = places_in(layer, family.places)
        for place in places:
            if place.stays:
                u = units_at(layer, place, model.config)
                unpruned = by_output.setdefault(place.reads, Unpruned(place.stays))
                unpruned.layers += 1
                unpruned.parameters += u.count * unit_cost(u, layer)
        # One output may have a refused and an accepted candidate.
        known = {place.reads for place in places if place.kind == "neurons"}
        for place in family.refused:
            if place.reads not in known and _has_place(layer, place):
                known.add(place.reads)
                unpruned = by_output.setdefault(place.reads, Unpruned(place.stays))
                unpruned.layers += 1
                unpruned.parameters += _remaining_parameters(layer, place, sliced)
    return by_output


def _remaining_parameters(layer: nn.Module, place: Place, sliced: Container[int]) -> int:
    """Return the number of parameters in modules of a place, without those of other units, whose ids are `sliced`."""
    modules = [attribute_at(layer, path) for path in place.classes if path]  # without the layer itself
    by_id = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() for key, parameter in by_id.items() if key not in sliced)


# Weights by channel


def input_weights(u: Units, layer: nn.Module, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Return the rows that compute each channel, as matrices (C, H) float32 on a device, for neurons of all experts.

    For neurons these are gate and up. For KV groups they are the value rows, repeated for the query heads that share
    each row.
    """
    return tuple(rows.to(device) for s in u.inputs for rows in _rows_of_channels(u, s, layer))


def output_weight(u: Units, layer: nn.Module, device: torch.device | str = "cpu") -> Tensor:
    """Return the weight that reads the units, (H, C) float32 on a device, for neurons of all experts."""
    s = u.slices[-1]
    weight = _float(layer, s.path)
    if weight.dim() == 3:
        return rearrange(weight if s.dim == 2 else weight.transpose(1, 2), "e h n -> h (e n)").to(device)
    return (weight if s.dim == 1 else weight.T).to(device)


@torch.no_grad()
def set_output(u: Units, layer: nn.Module, weight: Tensor, added_bias: Tensor | None) -> None:
    """Write the weight that reads the units, (H, C), and add to its bias, which is created if missing."""
    s, (module, name) = u.slices[-1], find_parent(layer, u.slices[-1].path)
    stored = getattr(module, name)
    if stored.dim() == 3:
        weight = rearrange(weight, "h (e n) -> e h n", e=len(stored))
    columns = weight.dim() - 1
    stored.copy_(weight if s.dim == columns else weight.transpose(-1, -2))
    if added_bias is not None:
        bias = added_bias.to(stored)
        if module.bias is not None:
            bias = bias + module.bias
        module.bias = nn.Parameter(bias, requires_grad=False)


def _float(layer: nn.Module, path: str) -> Tensor:
    """Return a weight of a layer in float32, loaded if it is offloaded."""
    module, name = find_parent(layer, path)
    return load_parameter(module, name).detach().float()


def _rows_of_channels(u: Units, s: Slice, layer: nn.Module) -> Iterator[Tensor]:
    """Yield the matrices (C, H) float32 in a tensor that has one or more rows for each channel."""
    weight, in_order = _float(layer, s.path), s.unit.argsort(stable=True)
    by_unit = in_order[int((s.unit < 0).sum()) :].view(u.count, -1)  # rows of each unit
    if weight.dim() == 3:  # experts: (E, rows, H)
        weight = weight if s.dim == 1 else weight.transpose(1, 2)
        for rows in by_unit.T:
            yield rearrange(weight[:, rows.to(weight.device)], "e n h -> (e n) h").contiguous()
        return
    weight = weight if s.dim == 0 else weight.T
    channels = len(u.slices[-1].unit) // u.count  # of each unit
    if len(weight) != by_unit.numel() or not by_unit.flatten().equal(torch.arange(len(weight))):
        weight = weight[by_unit.flatten().to(weight.device)]
    by_unit = weight.unflatten(0, (u.count, -1))
    if (rows := by_unit.shape[1]) > channels:
        yield from (part.flatten(0, 1).contiguous() for part in by_unit.split(channels, dim=1))
        return
    if rows < channels:  # query heads share the rows
        by_unit = by_unit.repeat(1, channels // rows, 1)
    of_channels = by_unit.flatten(0, 1)
    if u.repeats is None:  # from the order of units to that of channels
        of_channels = of_channels[u.slices[-1].unit.argsort(stable=True).argsort()]
    yield of_channels
