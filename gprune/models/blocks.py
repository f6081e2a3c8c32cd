"""A model as gprune sees it: blocks of prunable parts, found by the record of the model's family.

A `Part` is one logical weight matrix, whichever way it is stored: alone, fused with others, transposed, or stacked
over experts. A `Slice` is one parameter and the unit that each index along one of its dimensions belongs to: surgery,
costs and the saved form are made of slices alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.models.families import Family, family_of
from gprune.models.offload import stored

FFN, ATTENTION = ("gate", "up", "down"), ("query", "key", "value", "output")
HEADS = "num_attention_heads"


@dataclass(frozen=True)
class Part:
    """One logical weight matrix of a block: rows give outputs, columns take inputs."""

    host: nn.Module  # the linear layer, or the experts
    rows: Tensor | None = None  # (out,) int64: the part's rows in a fused host; None: all rows
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """(out, in), in the model's dtype; a view where the part is stored alone, fetched where it is offloaded."""
        weight = stored(self.host, "weight")
        weight = weight.T if self.transposed else weight
        return weight if self.rows is None else weight[self.rows.to(weight.device)]

    @property
    def bias(self) -> Tensor | None:
        """(out,)"""
        bias = stored(self.host, "bias")
        return bias if bias is None or self.rows is None else bias[self.rows.to(bias.device)]

    @property
    def in_features(self) -> int:
        """Columns of the weight as (out, in)."""
        return self.host.weight.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        """Rows of the weight as (out, in); of this part alone, where parts are stored together."""
        return self.host.weight.shape[1 if self.transposed else 0] if self.rows is None else len(self.rows)

    def set(self, weight: Tensor, added_bias: Tensor | None) -> None:
        """Write the weight of a part stored alone, and add to its bias, which is created if there is none."""
        self.host.weight.copy_(weight.T if self.transposed else weight)
        if added_bias is not None:
            added = added_bias.to(self.host.weight)
            added = added if self.host.bias is None else added + self.host.bias
            self.host.bias = nn.Parameter(added, requires_grad=False)


@dataclass(frozen=True)
class ExpertPart:
    """One weight matrix of all E experts, stacked: (E, N, H) for gate and up, (E, H, N) for down."""

    host: nn.Module
    name: str  # of `gate`, `up`, `down`
    bias: None = None

    @property
    def stacked(self) -> Tensor:
        """(E, N, H) of gate or up, (E, H, N) of down."""
        if self.name == "down":
            return stored(self.host, "down_proj")
        return stored(self.host, "gate_up_proj").chunk(2, dim=1)[self.name == "up"]

    @property
    def weight(self) -> Tensor:
        """Rows of gate and up (E x N, H), columns of down (H, E x N): expert by expert."""
        if self.name == "down":
            return rearrange(self.stacked, "e h n -> h (e n)")
        return rearrange(self.stacked, "e n h -> (e n) h")

    @property
    def in_features(self) -> int:
        """Columns, those of all experts side by side in `down`."""
        E, _, N = self.host.down_proj.shape
        return E * N if self.name == "down" else self.host.down_proj.shape[1]

    @property
    def out_features(self) -> int:
        """Rows, those of all experts below each other but in `down`."""
        E, H, N = self.host.down_proj.shape
        return H if self.name == "down" else E * N

    def set(self, weight: Tensor, added_bias: None) -> None:
        """Write the columns of down, (H, E x N)."""
        assert added_bias is None, "experts have no bias"
        self.host.down_proj.copy_(rearrange(weight, "h (e n) -> e h n", e=len(self.host.down_proj)))


@dataclass(frozen=True)
class Slice:
    """A parameter that shrinks along `dim` when units go; index i belongs to unit `units[i]`."""

    path: str  # relative to the layer, with the parameter's own name
    dim: int
    kind: str  # `ffn` or `attention`
    units: Tensor  # (size along dim,) int64, of one expert
    sizes: dict[str, int]  # size along dim as multiples of `neurons`, `heads` and `kv_groups`


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    A *neuron* j is row j of gate and up and column j of down, in every expert where there are experts; a *KV group* g
    is key/value head g with the query heads that share it, i.e. `channels_per_group` consecutive columns of the
    output projection.
    """

    index: int
    layer: nn.Module
    family: Family
    head_dim: int
    parts: dict[str, Part | ExpertPart]
    experts: int = 1

    def __getattr__(self, name: str) -> Any:
        """`block.down` is `block.parts["down"]`; None for a gate that the family does not have."""
        if name in (*FFN, *ATTENTION):
            return self.parts.get(name)
        raise AttributeError(name)

    def parts_of(self, kind: str) -> list[Part | ExpertPart]:
        """The weight matrices of `ffn` or of `attention`."""
        return [self.parts[name] for name in {"ffn": FFN, "attention": ATTENTION}[kind] if name in self.parts]

    def module(self, path: str | None) -> nn.Module | None:
        """The layer's module at a path of the family's record."""
        return None if path is None else attrgetter(path)(self.layer)

    @property
    def ffn_norm(self) -> nn.Module | None:
        """The norm before gate and up; attention's, where norms stand behind what they would stand before."""
        return self.module(self.family.ffn_norm if self._norms_before else self.family.attention_norm)

    @property
    def attention_norm(self) -> nn.Module | None:
        """The norm before query, key and value, if it is one of this layer."""
        return self.module(self.family.attention_norm) if self._norms_before else None

    @property
    def _norms_before(self) -> bool:
        flag = self.family.norms_before
        return flag is None or getattr(self.layer, flag)

    def joins_residual(self, part: str) -> bool:
        """Whether the output of `down` or `output` is added to the residual as it is, without a norm between."""
        norm = self.family.after_ffn if part == "down" else self.family.after_attention
        return norm is None and self._norms_before

    @property
    def has_experts(self) -> bool:
        """Whether the FFN is a mixture of experts."""
        return isinstance(self.down, ExpertPart)

    @property
    def neurons(self) -> int:
        """The width of the FFN, of each expert where there are experts."""
        return self.down.in_features // self.experts

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.output.in_features // self.head_dim

    @property
    def kv_groups(self) -> int:
        """Key and value heads, each with the query heads that share it."""
        return self.key.out_features // self.head_dim

    @property
    def channels_per_group(self) -> int:
        """Columns of the output projection (= query heads x head_dim) that belong to one KV group."""
        return self.output.in_features // self.kv_groups

    def per_query_head(self, values: Tensor) -> Tensor:
        """Values of key/value rows, (kv_groups x head_dim, ...), repeated for the query heads that share each row:
        (heads x head_dim, ...)."""
        q = self.heads // self.kv_groups
        return repeat(values, "(g d) ... -> (g q d) ...", d=self.head_dim, q=q)

    @property
    def activation(self) -> nn.Module:
        """The non-linear unit of the FFN."""
        return self.down.host.act_fn if self.has_experts else self.module(self.family.activation)

    @property
    def cost(self) -> int:
        """Parameters that go when the whole block goes."""
        return sum(parameter.numel() for parameter in self.layer.parameters())

    @property
    def neuron_cost(self) -> int:
        """Parameters that go when one neuron goes, from all experts at once."""
        return self._unit_cost("ffn", self.neurons)

    @property
    def group_cost(self) -> int:
        """Parameters that go when one KV group goes."""
        return self._unit_cost("attention", self.kv_groups)

    def _unit_cost(self, kind: str, units: int) -> int:
        return sum(self.parameter(s).numel() // units for s in self.slices if s.kind == kind)

    def parameter(self, place: Slice) -> nn.Parameter:
        """The parameter that a slice is of."""
        return attrgetter(place.path)(self.layer)

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """Every parameter that pruning makes smaller."""
        return tuple(self._ffn_slices() + self._attention_slices())

    def config_terms(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Multiples of `neurons`, `heads`, `kv_groups` and `channels` as multiples of the config's own keys."""
        width = self.family.width if self.has_experts or self.family.experts is None else "intermediate_size"
        keys = {"neurons": width, "heads": HEADS, "kv_groups": self.family.kv_heads or HEADS, "channels": HEADS}
        terms: dict[str, int] = {}
        for name, times in sizes.items():
            terms[keys[name]] = terms.get(keys[name], 0) + times * (self.head_dim if name == "channels" else 1)
        return terms

    @property
    def config_values(self) -> dict[str, int]:
        """The layer's sizes by the config's own keys."""
        sizes = {"neurons": self.neurons, "heads": self.heads}
        if self.family.kv_heads is not None:
            sizes["kv_groups"] = self.kv_groups
        return self.config_terms(sizes)

    @property
    def attributes(self) -> dict[str, dict[str, int]]:
        """Attributes in which stock code keeps sizes, as multiples of the config's keys: path -> {key: n}."""
        return {path: self.config_terms({what: 1}) for path, what in self.family.attributes.items()}

    def _ffn_slices(self) -> list[Slice]:
        family, N = self.family, torch.arange(self.neurons)
        if self.has_experts:
            return [
                Slice(f"{family.experts}.gate_up_proj", 1, "ffn", N.repeat(2), {"neurons": 2}),
                Slice(f"{family.experts}.down_proj", 2, "ffn", N, {"neurons": 1}),
            ]
        places = [path for path in dict.fromkeys((family.gate, family.up)) if path]
        copies = 2 if family.gate == family.up else 1
        found = [s for path in places for s in self._rows(path, "ffn", N.repeat(copies), {"neurons": copies})]
        return [*found, self._columns(family.down, "ffn", N, {"neurons": 1})]

    def _attention_slices(self) -> list[Slice]:
        family, d = self.family, self.head_dim
        q = torch.arange(self.kv_groups).repeat_interleave(self.channels_per_group)
        kv = torch.arange(self.kv_groups).repeat_interleave(d)
        own = {"query": (q, {"heads": d}), "key": (kv, {"kv_groups": d}), "value": (kv, {"kv_groups": d})}
        if family.query == family.key:
            units = torch.cat([q, kv, kv])
            units = units.sort(stable=True).values if family.interleaved else units
            found = self._rows(family.query, "attention", units, {"heads": d, "kv_groups": 2 * d})
        else:
            found = [s for name in own for s in self._rows(getattr(family, name), "attention", *own[name])]
        for path, name in ((family.query_norm, "query"), (family.key_norm, "key")):
            if path is not None:
                found.append(Slice(f"{path}.weight", 0, "attention", *own[name]))
        return [*found, self._columns(family.output, "attention", q, {"heads": d})]

    def _rows(self, path: str, kind: str, units: Tensor, sizes: dict[str, int]) -> list[Slice]:
        weight = Slice(f"{path}.weight", int(self.family.transposed), kind, units, sizes)
        bias = self.module(path).bias is not None
        return [weight, *([Slice(f"{path}.bias", 0, kind, units, sizes)] if bias else [])]

    def _columns(self, path: str, kind: str, units: Tensor, sizes: dict[str, int]) -> Slice:
        return Slice(f"{path}.weight", int(not self.family.transposed), kind, units, sizes)


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """The blocks of a supported model, first layer first."""
    family, config = family_of(model.config.model_type), model.config
    # `or` keeps it lazy: to read a global head count is an error where layers differ in heads.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [block_of(layer, family, head_dim, index) for index, layer in enumerate(decoder_layers(model))]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a supported model, as its decoder holds them."""
    return getattr(model.get_decoder(), family_of(model.config.model_type).layers)


def block_of(layer: nn.Module, family: Family, head_dim: int, index: int = 0) -> Block:
    """One decoder layer as its weights are now."""

    def part(name: str, rows: Tensor | None = None) -> Part:
        return Part(attrgetter(getattr(family, name))(layer), rows, family.transposed)

    experts = _experts(family, layer)
    if experts is not None:
        parts = {name: ExpertPart(experts, name) for name in FFN}
    else:
        parts = {name: part(name) for name in FFN if getattr(family, name) is not None}
        if family.gate == family.up:
            N = parts["down"].in_features
            parts |= {name: part(name, torch.arange(N) + i * N) for i, name in enumerate(("gate", "up"))}
    parts |= {name: part(name) for name in ATTENTION}
    if family.query == family.key:
        total, query = parts["query"].out_features, parts["output"].in_features
        rows = _fused_rows(total, query, head_dim, interleaved=family.interleaved)
        parts |= {name: part(name, rows[name]) for name in rows}
    return Block(index, layer, family, head_dim, parts, 1 if experts is None else len(experts.down_proj))


def _experts(family: Family, layer: nn.Module) -> nn.Module | None:
    try:
        return None if family.experts is None else attrgetter(family.experts)(layer)
    except AttributeError:  # a dense layer between layers with experts
        return None


def _fused_rows(total: int, query: int, head_dim: int, *, interleaved: bool) -> dict[str, Tensor]:
    """Rows of query, key and value, each in the order of heads, in a projection of `total` rows."""
    key = (total - query) // 2
    runs = key // head_dim if interleaved else 1  # of query, key and value rows, one run after the other
    split = torch.arange(total).view(runs, -1).split([query // runs, key // runs, key // runs], dim=1)
    return {name: rows.flatten() for name, rows in zip(ATTENTION, split, strict=False)}
