"""Blocks of prunable parts in a model, which are found by the record of the model's family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, zip_longest
from operator import attrgetter
from typing import Any

from einops import repeat
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gprune.models.families import Family, decoder_layers, record_of
from gprune.models.modeling_pruned import find_parent
from gprune.models.parts import PARTS, ExpertPart, Part, attribute_at, names_in, part_row_indices, parts_of


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
    family: Family  # the model's record, with the fields of this block's FFN and attention
    head_dim: int

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
        """The norm before gate and up, or None."""
        return self.module(self.family.ffn_norm)

    @property
    def attention_norm(self) -> nn.Module | None:
        """The norm before query, key and value; None if norms follow the residual sum of the previous layer."""
        return self.module(self.family.attention_norm)

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
    def all_neurons(self) -> int:
        """Number of neurons of the FFN, of all experts together: the length of its masks."""
        return 0 if self.down is None else self.down.in_features

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
    def sizes(self) -> dict[str, int]:
        """Sizes of the block, by the names that `Family.attributes` uses."""
        return {
            "neurons": self.neurons,
            "experts": self.experts,
            "heads": self.heads,
            "kv_groups": self.kv_groups,
            "channels": self.channels,
            "kv_channels": self.kv_groups * self.head_dim,
        }

    @property
    def config_values(self) -> dict[str, int]:
        """Sizes of the block by config key, without sizes of 0 and those that have no key."""
        family, sizes = self.family, self.sizes
        # `Family.width` is the width of experts if the family has any. Dense layers between them have another key.
        is_dense_layer = family.experts is not None and not self.has_experts
        width = "intermediate_size" if is_dense_layer else family.width
        names = {width: "neurons", "num_attention_heads": "heads", family.kv_heads: "kv_groups"}
        if self.has_experts:
            names[family.expert_count] = "experts"
        return {key: sizes[name] for key, name in names.items() if key and sizes[name]}

    @property
    def attributes(self) -> dict[str, int]:
        """Attributes of stock modules that contain sizes: path -> value."""
        return {path: self.sizes[name] for path, name in self.family.attributes.items()}


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """Return the blocks of a model, in order, by its record: one or more for each layer."""
    record = record_of(model)
    config = model.config.get_text_config(decoder=True)
    blocks: list[Block] = []
    for layer_index, layer in enumerate(decoder_layers(model)):
        blocks += _blocks_of_layer(len(blocks), layer_index, layer, record, config)
    return blocks


def fused_rows(block: Block) -> dict[nn.Module, list[Tensor]]:
    """Return for each fused linear layer of a block the row indices of each of its parts."""
    hosts: dict[nn.Module, list[Tensor]] = {}
    for part in block.parts.values():
        if isinstance(part, Part) and part.rows is not None:  # an `ExpertPart` has no rows
            hosts.setdefault(part.host, []).append(part.rows)
    return hosts


def fused_tensors(block: Block) -> Iterator[tuple[nn.Module, str, list[Tensor], int]]:
    """Yield the tensors of a block that contain several parts: module, name, rows of each part, dimension of rows."""
    for host, rows in fused_rows(block).items():
        yield host, "weight", rows, 1 if isinstance(host, Conv1D) else 0  # Conv1D stores the transposed weight
        if host.bias is not None:
            yield host, "bias", rows, 0
    for tensor, (dim, layout) in block.family.expert_rows.items() if block.has_experts else ():
        names = names_in(layout)
        if len(names) > 1:  # gate and up of all experts
            host, name = find_parent(block.down.host, tensor)
            indices = part_row_indices(layout, dict.fromkeys(names, block.neurons), block.neurons)
            yield host, name, list(indices.values()), dim


def _blocks_of_layer(
    first_index: int, layer_index: int, layer: nn.Module, record: Family, config: PreTrainedConfig
) -> list[Block]:
    """Return the blocks of a layer, at least one.

    Block number i has FFN number i and attention number i of the layer, among those that are pruned.
    """
    pruned_ffns, pruned_attentions = (
        [kind for kind, stays in kinds_of(layer, kinds) if stays is None] for kinds in record.kinds
    )
    pairs = list(zip_longest(pruned_ffns, pruned_attentions, fillvalue={})) or [({}, {})]
    records = [_record_of_block(record, pair) for pair in pairs]
    return [
        Block(first_index + order, layer_index, layer, own, _head_dim(layer, own, config))
        for order, own in enumerate(records)
    ]


def sizes_of_layer(blocks: Sequence[Block]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the sizes of a layer by our names and by config key, and `Block.attributes`, over its blocks.

    The first block has precedence.
    """
    values: dict[str, int] = {}
    attributes: dict[str, int] = {}
    for block in reversed(blocks):
        values |= block.sizes | block.config_values
        attributes |= block.attributes
    return values, attributes


def by_layer(blocks: Iterable[Block]) -> list[list[Block]]:
    """Group blocks by layer, in order."""
    return [list(group) for _, group in groupby(blocks, key=lambda block: block.layer_index)]


def kinds_of(layer: nn.Module, kinds: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str | None]]:
    """Return the kinds of FFN or attention in a layer, each with the reason not to prune it, or None if it is pruned.

    The first of several kinds with the same output projection is used. The first kind of a layer is always pruned.
    """
    kind_by_output: dict[str | None, Mapping[str, Any]] = {}
    for kind in kinds:
        if _has_kind(layer, kind):
            kind_by_output.setdefault(output_of(kind), kind)
    return [(kind, kind.get("stays") if position else None) for position, kind in enumerate(kind_by_output.values())]


def output_of(kind: Mapping[str, Any]) -> str | None:
    """Return the path of the output projection or of the experts of a kind; None if the record's fields have it."""
    return kind.get("experts") or kind.get("down") or kind.get("output")


def block_of(layer: nn.Module, record: Family, kind: Mapping[str, Any], config: PreTrainedConfig) -> Block:
    """Return a block that has one kind of FFN or attention of a layer, whether the kind is pruned or not."""
    record = _record_of_block(record, [kind])
    return Block(0, 0, layer, record, _head_dim(layer, record, config))


def _record_of_block(record: Family, kinds: Sequence[Mapping[str, Any]]) -> Family:
    """Return the record of one block with these kinds, at most one FFN and one attention."""
    fields = {name: value for kind in kinds for name, value in kind.items() if name != "classes"}
    for name in ("layout", "attributes", "extras"):  # both kinds may have them
        fields[name] = dict(getattr(record, name))
        for kind in kinds:
            fields[name] |= kind.get(name, {})
    return replace(record, kinds=(), **fields)


def _head_dim(layer: nn.Module, record: Family, config: PreTrainedConfig) -> int:
    """Return the size of a value head of a block with this record; 1 without attention."""
    if record.output is None:
        return 1
    of_layer = attribute_at(layer, record.head_dim) if record.head_dim else None
    # `or` is lazy on purpose: reading a global number of heads is an error if layers differ in it.
    return of_layer or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _has_kind(layer: nn.Module, kind: Mapping[str, Any]) -> bool:
    """Return whether a layer has the modules of a kind of FFN or attention, with the same names of classes.

    PyTorch's parametrizations replace the class by a subclass. The prefix that they add to its name is removed.
    """
    for path, class_name in kind.get("classes", {}).items():
        module = attribute_at(layer, path)
        if module is None or type(module).__name__.removeprefix("Parametrized") != class_name:
            return False
    return True
