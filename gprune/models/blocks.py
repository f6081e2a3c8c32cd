"""Blocks of prunable parts in a model, which are found by the record of the model's family.

A `Slice` maps each index along one dimension of a parameter to the unit that it belongs to. Surgery, costs and the
format of exports are all defined by slices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    beside: tuple[Block, ...] = ()  # other blocks of the layer; only for the first block

    @cached_property
    def parts(self) -> dict[str, Part | ExpertPart]:
        """Weight matrices of the block, by name."""
        return parts_of(self.layer, self.family, self.head_dim)

    def __getattr__(self, name: str) -> Any:
        """Return a part by name: `block.down` is `block.parts["down"]`, or None without such a part."""
        if any(name in names for names in PARTS.values()):
            return self.parts.get(name)
        raise AttributeError(name)

    def module(self, path: str | None) -> nn.Module | None:
        """Return the layer's module at a path of the family's record."""
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
        return self.norm_behind(part) is None

    def norm_behind(self, part: str) -> nn.Module | None:
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
        q = self.heads // self.kv_groups
        return repeat(values, "(g d) ... -> (g q d) ...", d=self.head_dim, q=q)

    @property
    def cost(self) -> int:
        """Number of parameters of the whole block. The costs of a layer's blocks add up to all its parameters."""
        return self.whole_cost()

    def whole_cost(self, weight: Callable[[Tensor], int] = lambda parameter: 1) -> int:
        """Return `cost`, with each parameter counted `weight(parameter)` times."""
        if self.order == 0:
            layer = sum(weight(parameter) * parameter.numel() for parameter in self.layer.parameters())
            return layer - sum(block.whole_cost(weight) for block in self.beside)
        return self.neurons * self.unit_cost("ffn", weight) + self.kv_groups * self.unit_cost("attention", weight)

    def unit_cost(self, kind: str, weight: Callable[[Tensor], int] = lambda parameter: 1) -> int:
        """Return the number of parameters of a neuron (`ffn`; summed over experts) or a KV group (`attention`).

        Each parameter is counted `weight(parameter)` times.
        """
        units = max(1, self.neurons if kind == "ffn" else self.kv_groups)
        return sum(weight(p) * (p.numel() // units) for p in (self.parameter(s) for s in self.slices if s.kind == kind))

    def parameter(self, place: Slice) -> nn.Parameter:
        """Return the parameter of a slice."""
        return attrgetter(place.path)(self.layer)

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """All parameters that become smaller by pruning."""
        family, N, slices = self.family, torch.arange(self.neurons), []
        dim = {path: (int(part.transposed), int(not part.transposed)) for path, part in self._by_path.items()}
        if self.has_experts:
            for tensor, (along, layout) in family.expert_rows.items():
                units = torch.cat([N.repeat_interleave(len(names.split())) for names in layout.split("|")])
                size = {"neurons": len(names_in(layout))}
                slices.append(Slice(f"{family.experts}.{tensor}", along, "ffn", units, size))
            tensor, along = family.expert_down
            slices.append(Slice(f"{family.experts}.{tensor}", along, "ffn", N, {"neurons": 1}))
        elif self.down is not None:
            neurons = N, {"neurons": 1}
            slices += self._rows("ffn", {"gate": neurons, "up": neurons})
            slices.append(Slice(f"{family.down}.weight", dim[family.down][1], "ffn", *neurons))
        if self.output is None:
            return tuple(slices)
        groups = torch.arange(self.kv_groups)
        query = groups.repeat_interleave(self.channels_per_group), {"heads": self.head_dim}
        own = {"query": self._of_groups(self.query.out_features)}
        own |= {name: self._of_groups(self.parts[name].out_features, "kv_groups") for name in ("key", "value")}
        slices += self._rows("attention", own)
        for path, (along, kind) in family.extras.items():
            if (parameter := self._parameter(path)) is not None:
                slices.append(Slice(path, along, kind, *self._of_groups(parameter.shape[along])))
        norms = ((family.query_norm, own["query"]), (family.key_norm, own["key"]))
        slices += [Slice(f"{path}.weight", 0, "attention", *sizes) for path, sizes in norms if path is not None]
        return (*slices, Slice(f"{family.output}.weight", dim[family.output][1], "attention", *query))

    @property
    def _by_path(self) -> dict[str, Part]:
        """One part of each module that has parts, by the path of the module."""
        return {getattr(self.family, name): part for name, part in self.parts.items() if isinstance(part, Part)}

    def _parameter(self, path: str) -> nn.Parameter | None:
        """Return a parameter by its path in the layer, or None."""
        module, name = find_parent(self.layer, path)
        return getattr(module, name, None)

    def _of_groups(self, length: int, unit: str = "heads") -> tuple[Tensor, dict[str, int]]:
        """Return units and sizes of `length` rows that are divided equally among KV groups, in order."""
        units = torch.arange(self.kv_groups).repeat_interleave(length // self.kv_groups)
        return units, {unit: length // (self.heads if unit == "heads" else self.kv_groups)}

    def _rows(self, kind: str, own: Mapping[str, tuple[Tensor, dict[str, int]]]) -> list[Slice]:
        """Return slices of modules whose rows belong to units, fused or not. `own`: units and sizes of each part."""
        slices, paths = [], {name: getattr(self.family, name) for name in own if name in self.parts}
        for path in dict.fromkeys(paths.values()):
            names = [name for name in paths if paths[name] == path]
            units, part = torch.cat([own[name][0] for name in names]), self.parts[names[0]]
            if part.rows is not None:
                units = units[torch.cat([self.parts[name].rows for name in names]).argsort()]
            sizes = dict(sum((Counter(own[name][1]) for name in names), Counter()))
            slices.append(Slice(f"{path}.weight", int(part.transposed), kind, units, sizes))
            if self.module(path).bias is not None:
                slices.append(Slice(f"{path}.bias", 0, kind, units, sizes))
        return slices

    def config_terms(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Convert multiples of `neurons`, `heads`, `kv_groups` and `channels` to multiples of config keys."""
        width = self.family.width if self.has_experts or self.family.experts is None else "intermediate_size"
        if self.family.found:
            return dict(sizes)
        keys = {"neurons": width, "heads": HEADS, "kv_groups": self.family.kv_heads or HEADS, "channels": HEADS}
        terms: Counter[str] = Counter()
        for name, times in sizes.items():
            terms[keys[name]] += times * (self.head_dim if name == "channels" else 1)
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
            keys = (self.family.width, "neurons"), (HEADS, "heads"), (self.family.kv_heads, "kv_groups")
            return sizes | {key: sizes[own] for key, own in keys if key and sizes[own]}
        if self.family.kv_heads is not None:
            sizes["kv_groups"] = self.kv_groups
        return self.config_terms(sizes)

    @property
    def sizes(self) -> SimpleNamespace:
        """Sizes of the block by the names in `attributes`."""
        return SimpleNamespace(**self.config_values)

    @property
    def attributes(self) -> dict[str, dict[str, int]]:
        """Attributes of stock modules that contain sizes: path -> {config key: n}, for the size n x value."""
        return {path: self.config_terms({what: 1}) for path, what in self.family.attributes.items()}


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """Return the blocks of a supported model, in order."""
    family, config = family_of(model), model.config.get_text_config(decoder=True)
    if family.kinds:
        blocks: list[Block] = []
        for number, layer in enumerate(decoder_layers(model)):
            blocks += _found_blocks(len(blocks), number, layer, family, config)
        return blocks
    head_dim = _config_head_dim(config)
    return [Block(index, index, layer, family, head_dim) for index, layer in enumerate(decoder_layers(model))]


def layer_values(blocks: Sequence[Block]) -> dict[str, int]:
    """Return `Block.config_values` of a layer, merged over its blocks; the first block has precedence."""
    values: dict[str, int] = {}
    for block in reversed(blocks):
        values |= block.config_values
    return values


def check_untied(model: PreTrainedModel) -> None:
    """Raise UserError if two layers share a tensor that units are sliced from."""
    owners: dict[int, str] = {}
    for block in blocks_of(model):
        for place in block.slices:
            here = f"'{place.path}' of layer {block.layer_index}"
            if (other := owners.setdefault(id(block.parameter(place)), here)) != here:
                raise UserError(
                    f"Model type '{model.config.model_type}' cannot be pruned: {here} and {other} are one tensor, so "
                    "removing a unit of one layer would remove weights of the other."
                )


def by_layer(blocks: Iterable[Block]) -> list[list[Block]]:
    """Group blocks by layer, in order."""
    return [list(own) for _, own in groupby(blocks, key=lambda block: block.layer_index)]


def _found_blocks(first: int, number: int, layer: nn.Module, family: Family, config: PreTrainedConfig) -> list[Block]:
    """Return the blocks of layer `number` of a discovered type. The first block has index `first`."""
    ffn, attention = ([kind for kind, stays in kinds_of(layer, kinds) if stays is None] for kinds in family.kinds)
    beside: list[Block] = []
    for order, chosen in reversed(list(enumerate(zip_longest(ffn, attention, fillvalue={})))):
        own = _with_kinds(family, chosen)
        rest = tuple(beside) if order == 0 else ()
        beside.insert(0, Block(first + order, number, layer, own, _head_dim(layer, own, config), order, rest))
    return beside or [Block(first, number, layer, _with_kinds(family, ()), 1)]


def kinds_of(layer: nn.Module, kinds: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str | None]]:
    """Return the kinds of FFN or attention in a layer, each with the reason not to prune it, or None if it is pruned.

    The first of several kinds with the same output projection is used. The first kind of a layer is always pruned.
    """
    own: dict[str, Mapping[str, Any]] = {}
    for kind in kinds:
        if _has(layer, kind):
            own.setdefault(output_of(kind), kind)
    return [(kind, kind.get("stays") if number else None) for number, kind in enumerate(own.values())]


def output_of(kind: Mapping[str, Any]) -> str:
    """Return the path of the output projection or of the experts of a kind of FFN or attention."""
    return kind.get("experts") or kind.get("down") or kind["output"]


@dataclass
class Staying:
    """An FFN or attention that is not pruned."""

    why: str
    layers: int = 0  # number of layers that have it
    parameters: int = 0  # parameters of its units, over all these layers


def unpruned(model: PreTrainedModel) -> dict[str, Staying]:
    """Return FFNs and attentions that are not pruned, because their layer has a larger one, by path of the output."""
    family, config = family_of(model), model.config.get_text_config(decoder=True)
    found: dict[str, Staying] = {}
    for layer in decoder_layers(model):
        for scope, kinds in zip(PARTS, family.kinds, strict=False):
            for kind, why in kinds_of(layer, kinds):
                if why is not None:
                    record = _with_kinds(family, [kind])
                    block = Block(0, 0, layer, record, _head_dim(layer, record, config))
                    one = found.setdefault(output_of(kind), Staying(why))
                    one.layers += 1
                    one.parameters += (block.neurons if scope == "ffn" else block.kv_groups) * block.unit_cost(scope)
    return found


def _with_kinds(family: Family, chosen: Sequence[Mapping[str, Any]]) -> Family:
    """Return the record of one block with these kinds of FFN and attention."""
    own = {name: value for kind in chosen for name, value in kind.items() if name != "classes"}
    for name in ("layout", "attributes", "extras"):
        own[name] = {path: value for kind in chosen for path, value in kind.get(name, {}).items()}
    own = {"gate": None, "up": None, "down": None, "query": None, "key": None, "value": None, "output": None} | own
    return replace(family, kinds=(), **own)


def _head_dim(layer: nn.Module, record: Family, config: PreTrainedConfig) -> int:
    """Return the size of a value head of a block with this record; 1 without attention."""
    if record.output is None:
        return 1
    module, name = find_parent(layer, record.head_dim or "")
    return getattr(module, name, None) or _config_head_dim(config)


def _config_head_dim(config: PreTrainedConfig) -> int:
    """Return the size of a head by the config, for all layers."""
    # `or` is lazy on purpose: reading a global number of heads is an error if layers differ in it.
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _has(layer: nn.Module, kind: Mapping[str, Any]) -> bool:
    """Return whether a layer has the modules of a kind of FFN or attention, with the same classes."""
    return all(
        (type(module).__name__.removeprefix("Parametrized") if (module := _at(layer, path)) is not None else None)
        == name
        for path, name in kind["classes"].items()
    )


def _at(layer: nn.Module, path: str) -> nn.Module | None:
    """Return the module of a layer at a path, or the layer for an empty path."""
    if not path:
        return layer
    module, name = find_parent(layer, path)
    return getattr(module, name, None)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a supported model."""
    return attrgetter(family_of(model).layers)(decoder_of(model))
