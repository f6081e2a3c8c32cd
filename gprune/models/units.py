"""The units of a model: which indices of which tensors belong to which neuron, KV group or expert."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.errors import UserError
from gprune.models.blocks import Block, block_of, blocks_of, by_layer, kinds_of, output_of
from gprune.models.experts import router_needs
from gprune.models.families import decoder_layers, record_of
from gprune.models.modeling_pruned import find_parent
from gprune.models.offload import load_parameter
from gprune.models.parts import PARTS, attribute_at
from gprune.units.structure import Slice, Units, unit_key

# Model type -> a function of a user that returns further units of a model, of a kind of its own.
UNITS: dict[str, Callable[[PreTrainedModel], Sequence[Units]]] = {}


def units_of(model: PreTrainedModel) -> list[Units]:
    """Return the units of a model: each layer, and for each of its blocks the experts, KV groups and neurons.

    There is one set of neurons and one of KV groups per block, which may be empty. Units of `UNITS` follow.

    Raises:
        UserError: if slices of a function in `UNITS` do not fit the model.
    """
    units = [u for blocks in by_layer(blocks_of(model)) for u in units_of_blocks(blocks, model.config)]
    further, layers = UNITS.get(record_of(model).model_type), decoder_layers(model)
    return units if further is None else [*units, *(_checked(u, layers[u.layer]) for u in further(model))]


def units_of_blocks(blocks: Sequence[Block], config: PreTrainedConfig) -> list[Units]:
    """Return the units of the blocks of one layer, from coarse to fine."""
    layer, index = blocks[0].layer, blocks[0].layer_index
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    units = [Units(unit_key("layer", index), "layer", index, count=1, parameters=parameters, least=0)]
    for block in blocks:
        neurons = _neurons(block)
        if block.experts > 1:
            units.append(_experts(block, neurons, config))
            neurons = replace(neurons, inside=units[-1].key)
        units += [_kv_groups(block), neurons]
    return [u if u.kind == "layer" else replace(u, parameters=unit_cost(u, layer)) for u in units]


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


def _experts(block: Block, neurons: Units, config: PreTrainedConfig) -> Units:
    """Return the experts of a block: their stacked tensors, the rows of the router, and what else has an index each."""
    slices = []
    for path, dim in {**dict.fromkeys((s.path for s in neurons.slices), 0), **block.family.per_expert}.items():
        if (tensor := attribute_at(block.layer, path)) is not None:  # a router may lack a bias
            numbers = torch.arange(tensor.shape[dim])  # indices after the last expert belong to none
            slices.append(Slice(path, dim, numbers.where(numbers < block.experts, -1)))
    groups, least, why_not = router_needs(block, config)
    return Units(
        unit_key("experts", block.index), "experts", block.layer_index, block.experts, slices=tuple(slices),
        reads=block.family.experts, least=least, step=groups, stays=why_not,
    )  # fmt: skip


def _neurons(block: Block) -> Units:
    """Return the neurons of a block: rows of gate and up, and columns of down."""
    family, slices = block.family, []
    u = Units(unit_key("neurons", block.index), "neurons", block.layer_index, block.neurons, rows=block.experts)
    if block.down is None:
        return u
    neurons = torch.arange(block.neurons)
    if block.has_experts:
        for tensor, (dim, layout) in family.expert_rows.items():
            # With `gate | up` rows belong to neurons 0, 1, ..., N - 1, 0, 1, ...; with `gate up` to 0, 0, 1, 1, ...
            unit = torch.cat([neurons.repeat_interleave(len(names.split())) for names in layout.split("|")])
            slices.append(Slice(f"{family.experts}.{tensor}", dim, unit))
        tensor, dim = family.expert_down
        down, reads = Slice(f"{family.experts}.{tensor}", dim, neurons), family.experts
    else:
        slices += _rows(block, {"gate": neurons, "up": neurons})
        down, reads = Slice(f"{family.down}.weight", _column_dim(block, "down"), neurons), family.down
    inputs = tuple(s for s in slices if attribute_at(block.layer, s.path).dim() == (3 if block.has_experts else 2))
    return replace(u, slices=(*slices, down), inputs=inputs, reads=reads)


def _kv_groups(block: Block) -> Units:
    """Return the KV groups of a block: heads of query, key and value, and columns of the output projection."""
    family, groups = block.family, block.kv_groups
    u = Units(unit_key("kv_groups", block.index), "kv_groups", block.layer_index, groups)
    if block.output is None:
        return u

    def unit_of(rows: int) -> Tensor:
        """Return the group of each row, which are divided equally among the groups, in order."""
        return torch.arange(groups).repeat_interleave(rows // groups)

    of_parts = {name: unit_of(block.parts[name].out_features) for name in ("query", "key", "value")}
    slices = list(_rows(block, of_parts))
    for path, (dim, _) in family.extras.items():
        if (tensor := attribute_at(block.layer, path)) is not None:  # a layer may lack it, such as a bias
            slices.append(Slice(path, dim, unit_of(tensor.shape[dim])))
    for norm, part in ((family.query_norm, "query"), (family.key_norm, "key")):
        if norm is not None:
            slices.append(Slice(f"{norm}.weight", 0, of_parts[part], is_norm=True))
    columns = unit_of(block.channels)
    slices.append(Slice(f"{family.output}.weight", _column_dim(block, "output"), columns))
    none = {name: torch.full_like(unit, -1) for name, unit in of_parts.items()}
    (value, *_bias) = _rows(block, none | {"value": of_parts["value"]}, only=family.value)
    return replace(u, slices=tuple(slices), inputs=(value,), reads=family.output)


def _rows(block: Block, unit_of_rows: Mapping[str, Tensor], only: str = "") -> Iterator[Slice]:
    """Yield slices of weights and biases of modules, fused or not, from part -> the unit of each of its rows."""
    paths = {name: getattr(block.family, name) for name in unit_of_rows if name in block.parts}
    for path in [only] if only else dict.fromkeys(paths.values()):
        parts = [name for name in paths if paths[name] == path]  # several if fused
        unit = torch.cat([unit_of_rows[name] for name in parts])
        if (first := block.parts[parts[0]]).rows is not None:  # in the order in which they are stored
            unit = unit[torch.cat([block.parts[name].rows for name in parts]).argsort()]
        yield Slice(f"{path}.weight", 1 if first.transposed else 0, unit)
        if block.module(path).bias is not None:
            yield Slice(f"{path}.bias", 0, unit)


def _column_dim(block: Block, part: str) -> int:
    """Return the dimension of columns in the stored weight of a part."""
    return 0 if block.parts[part].transposed else 1


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
    family = record_of(model)
    config = model.config.get_text_config(decoder=True)
    by_output: dict[str, Unpruned] = {}
    layers = decoder_layers(model)
    sliced = {id(attribute_at(layers[u.layer], s.path)) for u in units_of(model) for s in u.slices}
    for layer in layers:
        for scope, kinds in zip(PARTS, family.kinds, strict=True):
            for kind, why in kinds_of(layer, kinds):
                if why is None:
                    continue
                block = block_of(layer, family, kind, config)
                u = _neurons(block) if scope == "ffn" else _kv_groups(block)
                unpruned = by_output.setdefault(output_of(kind), Unpruned(why))
                unpruned.layers += 1
                unpruned.parameters += u.count * unit_cost(u, layer)
        # One output may have a refused and an accepted candidate.
        accepted = {output_of(kind) for kind, _ in kinds_of(layer, family.kinds[0])}
        for kind, _ in kinds_of(layer, family.refused):
            if output_of(kind) not in accepted:
                unpruned = by_output.setdefault(output_of(kind), Unpruned(kind["stays"]))
                unpruned.layers += 1
                unpruned.parameters += _remaining_parameters(layer, kind, sliced)
    return by_output


def _remaining_parameters(layer: nn.Module, kind: Mapping[str, Any], sliced: Container[int]) -> int:
    """Return the number of parameters in modules of a kind, without those of other parts, whose ids are `sliced`."""
    modules = [attribute_at(layer, path) for path in kind["classes"] if path]  # without the layer itself
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
