"""Blocks of prunable parts in a model, which are found by the record of the model's family.

A `Slice` maps each index along one dimension of a parameter to the unit that it belongs to. Surgery, costs and the
format of exports are all defined by slices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, zip_longest
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.errors import UserError
from gprune.models.families import Family
from gprune.models.lookup import decoder_of, family_of
from gprune.models.modeling_pruned import find_parent
from gprune.models.parts import PARTS, ExpertPart, Part, names_in, parts_of

HEADS = "num_attention_heads"


@dataclass(frozen=True)
class Slice:
    """A parameter that shrinks along `dim` when units are removed. Index i belongs to unit `units[i]`."""

    path: str  # of the parameter, relative to the layer
    dim: int
    kind: str  # `ffn` or `attention`
    units: Tensor  # (size along dim,) int64; for one expert
    sizes: dict[str, int]  # size along dim, as multiples of `neurons`, `heads` and `kv_groups`


@dataclass(frozen=True)
class Block:
    """An FFN and an attention of a decoder layer, or one of them. Masks and statistics have one entry per block.

    Most layers are one block. A layer with several FFNs, such as experts and shared experts, has a block for each. The
    first block also has the layer's attention and everything that is not pruned, such as norms.

    *Neuron* j is row j of gate and up and column j of down; each expert has its own neurons. *KV group* g is key/value
    head g with the query heads that share it, i.e. `channels_per_group` consecutive columns of the output projection.
    """

    index: int  # position among the blocks of the model
    layer_index: int  # number of the decoder layer
    layer: nn.Module
    family: Family  # the record of this block, if the layer has several
    head_dim: int
    order: int = 0  # position among the blocks of its layer
    other_blocks: tuple[Block, ...] = ()  # other blocks of the layer; only for the first block

    @cached_property
    def parts(self) -> dict[str, Part | ExpertPart]:
        """Weight matrices of the block, by name."""
        return parts_of(self.layer, self.family, self.head_dim)

    def __getattr__(self, name: str) -> Any:
        """Return a part by name: `block.down` is `block.parts["down"]`, or None without such a part."""
        if name in (*PARTS["ffn"], *PARTS["attention"]):
            return self.parts.get(name)
        raise AttributeError(name)

    def module(self, path: str | None) -> nn.Module | None:
        """Return the layer's module at a path of the family's record; None for None."""
        return None if path is None else attrgetter(path)(self.layer)

    @property
    def ffn_norm(self) -> nn.Module | None:
        """The norm before gate and up."""
        return self.module(self.family.ffn_norm)

    @property
    def attention_norm(self) -> nn.Module | None:
        """The norm before query, key and value; None if norms follow the residual sum of the previous layer."""
        return self.module(self.family.attention_norm)

    def joins_residual(self, part: str) -> bool:
        """Return whether the output of `down` or `output` is added to the residual without a norm."""
        return self.norm_after(part) is None

    def norm_after(self, part: str) -> nn.Module | None:
        """Return the norm between `down` or `output` and the residual, or None."""
        return self.module(self.family.after_ffn if part == "down" else self.family.after_attention)

    @property
    def has_experts(self) -> bool:
        """Whether the FFN is a mixture of experts."""
        return isinstance(self.down, ExpertPart)

    @property
    def experts(self) -> int:
        """Number of experts of the FFN; 1 without experts."""
        return self.down.shape[0] if self.has_experts else 1

    @property
    def neurons(self) -> int:
        """Width of the FFN, or of each expert; 0 without a prunable FFN."""
        return 0 if self.down is None else self.down.in_features // self.experts

    @property
    def heads(self) -> int:
        """Number of query heads; 0 without prunable attention."""
        return 0 if self.output is None else self.output.in_features // self.head_dim

    @property
    def kv_groups(self) -> int:
        """Number of KV groups; 0 without prunable attention."""
        return 0 if self.output is None else self.value.out_features // self.head_dim

    @property
    def channels_per_group(self) -> int:
        """Columns of the output projection per KV group: query heads of the group x head_dim."""
        return 0 if self.output is None else self.output.in_features // self.kv_groups

    @property
    def channels(self) -> int:
        """Number of columns of the output projection; 0 without prunable attention."""
        return 0 if self.output is None else self.output.in_features

    def per_query_head(self, values: Tensor) -> Tensor:
        """Repeat values of key/value rows, (kv_groups x head_dim, ...), for the query heads that share each row:
        (heads x head_dim, ...)."""
        heads_per_group = self.heads // self.kv_groups
        return repeat(values, "(g d) ... -> (g q d) ...", d=self.head_dim, q=heads_per_group)

    @property
    def cost(self) -> int:
        """Number of parameters of the whole block. The costs of a layer's blocks add up to all its parameters."""
        return self.whole_cost()

    def whole_cost(self, weight: Callable[[Tensor], int] = lambda parameter: 1) -> int:
        """Return `cost`, with each parameter counted `weight(parameter)` times.

        The first block of a layer has all parameters that are in no other block.
        """
        if self.order == 0:
            whole_layer = sum(weight(parameter) * parameter.numel() for parameter in self.layer.parameters())
            return whole_layer - sum(block.whole_cost(weight) for block in self.other_blocks)
        return self.neurons * self.unit_cost("ffn", weight) + self.kv_groups * self.unit_cost("attention", weight)

    def unit_cost(self, kind: str, weight: Callable[[Tensor], int] = lambda parameter: 1) -> int:
        """Return the number of parameters of a neuron (`ffn`; summed over experts) or a KV group (`attention`).

        Each parameter is counted `weight(parameter)` times.
        """
        units = max(1, self.neurons if kind == "ffn" else self.kv_groups)
        parameters = [self.parameter(slice_) for slice_ in self.slices if slice_.kind == kind]
        return sum(weight(parameter) * (parameter.numel() // units) for parameter in parameters)

    def parameter(self, slice_: Slice) -> nn.Parameter:
        """Return the parameter of a slice."""
        return attrgetter(slice_.path)(self.layer)

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """All parameters that become smaller by pruning."""
        return (*self._ffn_slices(), *self._attention_slices())

    def _ffn_slices(self) -> list[Slice]:
        """Return the parameters that become smaller if neurons are removed."""
        family = self.family
        if self.down is None:
            return []
        neurons = torch.arange(self.neurons)
        slices = []
        if self.has_experts:
            for tensor, (dim, layout) in family.expert_rows.items():
                # With `gate | up` rows belong to neurons 0, 1, ..., N - 1, 0, 1, ...; with `gate up` to 0, 0, 1, 1, ...
                units = torch.cat([neurons.repeat_interleave(len(names.split())) for names in layout.split("|")])
                size = {"neurons": len(names_in(layout))}
                slices.append(Slice(f"{family.experts}.{tensor}", dim, "ffn", units, size))
            tensor, dim = family.expert_down
            slices.append(Slice(f"{family.experts}.{tensor}", dim, "ffn", neurons, {"neurons": 1}))
            return slices
        one_per_neuron = neurons, {"neurons": 1}  # `units` and `sizes` of a slice
        slices += self._row_slices("ffn", {"gate": one_per_neuron, "up": one_per_neuron})
        slices.append(Slice(f"{family.down}.weight", self._column_dim("down"), "ffn", *one_per_neuron))
        return slices

    def _attention_slices(self) -> list[Slice]:
        """Return the parameters that become smaller if KV groups are removed."""
        family = self.family
        if self.output is None:
            return []
        rows = {
            "query": self._units_of_groups(self.query.out_features),
            "key": self._units_of_groups(self.key.out_features, "kv_groups"),
            "value": self._units_of_groups(self.value.out_features, "kv_groups"),
        }
        slices = self._row_slices("attention", rows)
        for path, (dim, kind) in family.extras.items():
            parameter = self._parameter_at(path)
            if parameter is not None:  # a layer may lack it, such as a bias
                slices.append(Slice(path, dim, kind, *self._units_of_groups(parameter.shape[dim])))
        for norm, part in ((family.query_norm, "query"), (family.key_norm, "key")):
            if norm is not None:
                slices.append(Slice(f"{norm}.weight", 0, "attention", *rows[part]))
        columns = torch.arange(self.kv_groups).repeat_interleave(self.channels_per_group)
        size = {"heads": self.head_dim}
        slices.append(Slice(f"{family.output}.weight", self._column_dim("output"), "attention", columns, size))
        return slices

    def _column_dim(self, name: str) -> int:
        """Return the dimension of columns in the stored weight of a part."""
        return 0 if self.parts[name].transposed else 1

    def _parameter_at(self, path: str) -> nn.Parameter | None:
        """Return a parameter by its path in the layer, or None."""
        module, name = find_parent(self.layer, path)
        return getattr(module, name, None)

    def _units_of_groups(self, length: int, unit: str = "heads") -> tuple[Tensor, dict[str, int]]:
        """Return `units` and `sizes` of a slice of `length` rows that are divided equally among KV groups, in order.

        The size is a multiple of `unit`, which is `heads` or `kv_groups`.
        """
        units = torch.arange(self.kv_groups).repeat_interleave(length // self.kv_groups)
        return units, {unit: length // (self.heads if unit == "heads" else self.kv_groups)}

    def _row_slices(self, kind: str, rows: Mapping[str, tuple[Tensor, dict[str, int]]]) -> list[Slice]:
        """Return slices of weights and biases of modules whose rows belong to units, fused or not."""
        slices = []
        paths = {name: getattr(self.family, name) for name in rows if name in self.parts}
        for path in dict.fromkeys(paths.values()):
            names = [name for name in paths if paths[name] == path]  # several if fused
            first_part = self.parts[names[0]]
            units = torch.cat([rows[name][0] for name in names])
            if first_part.rows is not None:  # in the order in which they are stored
                stored_order = torch.cat([self.parts[name].rows for name in names]).argsort()
                units = units[stored_order]
            sizes: Counter[str] = Counter()
            for name in names:
                sizes += Counter(rows[name][1])
            row_dim = 1 if first_part.transposed else 0
            slices.append(Slice(f"{path}.weight", row_dim, kind, units, dict(sizes)))
            if self.module(path).bias is not None:
                slices.append(Slice(f"{path}.bias", 0, kind, units, dict(sizes)))
        return slices

    def config_terms(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Convert a sum of sizes to a sum of values of the config."""
        if self.family.found:
            return dict(sizes)
        # `Family.width` is the width of experts if the family has any. Dense layers between them have another key.
        is_dense_layer = self.family.experts is not None and not self.has_experts
        width = "intermediate_size" if is_dense_layer else self.family.width
        keys = {"neurons": width, "heads": HEADS, "kv_groups": self.family.kv_heads or HEADS, "channels": HEADS}
        terms: Counter[str] = Counter()
        for name, factor in sizes.items():
            terms[keys[name]] += factor * (self.head_dim if name == "channels" else 1)
        return dict(terms)

    @property
    def config_values(self) -> dict[str, int]:
        """Sizes of the block by config key. Blocks of discovered types also have them by our own names."""
        sizes = {"neurons": self.neurons, "heads": self.heads}
        if self.family.found:
            sizes |= {
                "kv_groups": self.kv_groups,
                "channels": self.channels,
                "kv_channels": self.kv_groups * self.head_dim,
            }
            names_by_key = {self.family.width: "neurons", HEADS: "heads", self.family.kv_heads: "kv_groups"}
            return sizes | {key: sizes[name] for key, name in names_by_key.items() if key and sizes[name]}
        if self.family.kv_heads is not None:
            sizes["kv_groups"] = self.kv_groups
        return self.config_terms(sizes)

    @property
    def sizes(self) -> SimpleNamespace:
        """`config_values` as attributes of an object, like those of a config."""
        return SimpleNamespace(**self.config_values)

    @property
    def attributes(self) -> dict[str, dict[str, int]]:
        """Attributes of stock modules that contain sizes: path -> {config key: n}, for the size n x value."""
        return {path: self.config_terms({size: 1}) for path, size in self.family.attributes.items()}


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """Return the blocks of a supported model, in order."""
    family = family_of(model)
    config = model.config.get_text_config(decoder=True)
    layers = decoder_layers(model)
    # A discovered record has `kinds`: layers may differ, and each has a block for every FFN or attention that it has.
    # By a record without `kinds`, which is built in or written by a user, every layer is one block.
    if family.kinds:
        blocks: list[Block] = []
        for layer_index, layer in enumerate(layers):
            blocks += _discovered_blocks(len(blocks), layer_index, layer, family, config)
        return blocks
    head_dim = _config_head_dim(config)
    return [Block(index, index, layer, family, head_dim) for index, layer in enumerate(layers)]


def layer_values(blocks: Sequence[Block]) -> dict[str, int]:
    """Return `Block.config_values` of a layer, merged over its blocks; the first block has precedence."""
    values: dict[str, int] = {}
    for block in reversed(blocks):
        values |= block.config_values
    return values


def check_untied(model: PreTrainedModel) -> None:
    """Raise UserError if two layers share a tensor that units are sliced from."""
    owners: dict[int, str] = {}  # id of a parameter -> the first place where it is used
    for block in blocks_of(model):
        for slice_ in block.slices:
            place = f"'{slice_.path}' of layer {block.layer_index}"
            first_place = owners.setdefault(id(block.parameter(slice_)), place)
            if first_place != place:
                raise UserError(
                    f"Model type '{model.config.model_type}' cannot be pruned: {place} and {first_place} are one "
                    "tensor, so removing a unit of one layer would remove weights of the other."
                )


def by_layer(blocks: Iterable[Block]) -> list[list[Block]]:
    """Group blocks by layer, in order."""
    return [list(group) for _, group in groupby(blocks, key=lambda block: block.layer_index)]


def _discovered_blocks(
    first_index: int, layer_index: int, layer: nn.Module, family: Family, config: PreTrainedConfig
) -> list[Block]:
    """Return the blocks of a layer of a discovered type, at least one.

    Block number i has FFN number i and attention number i of the layer, among those that are pruned.
    """
    ffn_kinds, attention_kinds = family.kinds
    pruned_ffns = [kind for kind, stays in kinds_of(layer, ffn_kinds) if stays is None]
    pruned_attentions = [kind for kind, stays in kinds_of(layer, attention_kinds) if stays is None]
    pairs = list(zip_longest(pruned_ffns, pruned_attentions, fillvalue={}))
    if not pairs:
        return [Block(first_index, layer_index, layer, _record_of_block(family, ()), head_dim=1)]
    blocks: list[Block] = []
    for order, pair in reversed(list(enumerate(pairs))):  # the first block last, because it refers to the others
        record = _record_of_block(family, pair)
        other_blocks = tuple(blocks) if order == 0 else ()
        head_dim = _head_dim(layer, record, config)
        block = Block(first_index + order, layer_index, layer, record, head_dim, order, other_blocks)
        blocks.insert(0, block)
    return blocks


def kinds_of(layer: nn.Module, kinds: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str | None]]:
    """Return the kinds of FFN or attention in a layer, each with the reason not to prune it, or None if it is pruned.

    The first of several kinds with the same output projection is used. The first kind of a layer is always pruned.
    """
    kind_by_output: dict[str, Mapping[str, Any]] = {}
    for kind in kinds:
        if _has_kind(layer, kind):
            kind_by_output.setdefault(output_of(kind), kind)
    return [(kind, kind.get("stays") if position else None) for position, kind in enumerate(kind_by_output.values())]


def output_of(kind: Mapping[str, Any]) -> str:
    """Return the path of the output projection or of the experts of a kind of FFN or attention."""
    return kind.get("experts") or kind.get("down") or kind["output"]


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
    family = family_of(model)
    config = model.config.get_text_config(decoder=True)
    by_output: dict[str, Unpruned] = {}
    if not family.kinds:
        return by_output
    sliced = {id(block.parameter(slice_)) for block in blocks_of(model) for slice_ in block.slices}
    for layer in decoder_layers(model):
        for scope, kinds in zip(PARTS, family.kinds, strict=True):
            for kind, why in kinds_of(layer, kinds):
                if why is None:
                    continue
                record = _record_of_block(family, [kind])
                block = Block(0, 0, layer, record, _head_dim(layer, record, config))
                units = block.neurons if scope == "ffn" else block.kv_groups
                unpruned = by_output.setdefault(output_of(kind), Unpruned(why))
                unpruned.layers += 1
                unpruned.parameters += units * block.unit_cost(scope)
        # One output may have a refused and an accepted candidate.
        accepted = {output_of(kind) for kind, _ in kinds_of(layer, family.kinds[0])}
        for kind, _ in kinds_of(layer, family.refused):
            if output_of(kind) not in accepted:
                unpruned = by_output.setdefault(output_of(kind), Unpruned(kind["stays"]))
                unpruned.layers += 1
                unpruned.parameters += _remaining_parameters(layer, kind, sliced)
    return by_output


def _remaining_parameters(layer: nn.Module, kind: Mapping[str, Any], sliced: Container[int]) -> int:
    """Return the number of parameters in the modules of a kind, without those of other FFNs, whose ids are `sliced`."""
    modules = [_module_at(layer, path) for path in kind["classes"] if path]  # without the layer itself
    by_id = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() for key, parameter in by_id.items() if key not in sliced)


def _record_of_block(family: Family, kinds: Sequence[Mapping[str, Any]]) -> Family:
    """Return the record of one block with these kinds, at most one FFN and one attention."""
    fields: dict[str, Any] = dict.fromkeys(("gate", "up", "down", "query", "key", "value", "output"))
    for kind in kinds:
        fields |= {name: value for name, value in kind.items() if name != "classes"}
    for name in ("layout", "attributes", "extras"):
        fields[name] = {path: value for kind in kinds for path, value in kind.get(name, {}).items()}
    return replace(family, kinds=(), **fields)


def _head_dim(layer: nn.Module, record: Family, config: PreTrainedConfig) -> int:
    """Return the size of a value head of a block with this record; 1 without attention."""
    if record.output is None:
        return 1
    module, name = find_parent(layer, record.head_dim or "")  # no module has an attribute with an empty name
    return getattr(module, name, None) or _config_head_dim(config)


def _config_head_dim(config: PreTrainedConfig) -> int:
    """Return the size of a head by the config, for all layers."""
    # `or` is lazy on purpose: reading a global number of heads is an error if layers differ in it.
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _has_kind(layer: nn.Module, kind: Mapping[str, Any]) -> bool:
    """Return whether a layer has the modules of a kind of FFN or attention, with the same classes."""
    return all(_class_at(layer, path) == name for path, name in kind["classes"].items())


def _class_at(layer: nn.Module, path: str) -> str | None:
    """Return the name of the class of a layer's module, or None if there is no such module.

    PyTorch's parametrizations replace the class by a subclass. The prefix that they add to its name is removed.
    """
    module = _module_at(layer, path)
    return None if module is None else type(module).__name__.removeprefix("Parametrized")


def _module_at(layer: nn.Module, path: str) -> nn.Module | None:
    """Return the module of a layer at a path, or the layer for an empty path; None if there is no such module."""
    if not path:
        return layer
    module, name = find_parent(layer, path)
    return getattr(module, name, None)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a supported model."""
    return attrgetter(family_of(model).layers)(decoder_of(model))
