"""Keep masks -> smaller weights: real pruning, on the stock modules of transformers, without patching them.

A removed neuron takes its gate row, up row and down column with it; a removed KV group takes its key and
value head, the query heads that share it and their columns of the output projection. Since whole groups go,
the ratio of query to key/value heads stays what it was, and stock attention code, which infers the number of
heads from the shapes, runs on. The model's config keeps the dense numbers: the true widths are those of the
weights (see `gprune.architectures.blocks_of`), and `gprune.export` writes them where another program can read
them. Plain `save_pretrained` of a pruned stock model would write a folder that cannot be loaded.

A block whose masks keep nothing goes as a whole, norms included: the decoder has a layer fewer.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.architectures import Block, blocks_of
from gprune.errors import UserError

if TYPE_CHECKING:
    from gprune.masks import Masks

COUNT_SCOPES = ("ffn", "attention+ffn", "all")


@torch.no_grad()
def prune(model: PreTrainedModel, masks: Masks, *, inplace: bool = False) -> PreTrainedModel:
    """Slice the weights of every block down to the kept units.

    Biases go with their rows; a bias of the down or output projection stays whole. Parameters keep dtype,
    device and `requires_grad`. A pruned model can be pruned again, with masks as long as its present widths.

    Args:
        model: model of a supported family.
        masks: per block (neurons,) and (kv_groups,) bool, True = keep.
        inplace: slice `model` itself; otherwise it is left bit for bit as it was, and memory peaks at the
            dense model plus the smaller one, never two dense ones.

    Returns:
        The pruned model, of the same class.

    Raises:
        ValueError: a mask of the wrong length or dtype, or one that keeps nothing where the other keeps something.
    """
    check_masks(model, masks)
    if not inplace:
        # Weights that are sliced anyway are shared by the copy until their smaller version replaces them.
        sliced = [parameter for block in blocks_of(model) for parameter in _sliced_parameters(block)]
        memo: dict[int, object] = {id(parameter): parameter for parameter in sliced}
        # Whoever watches the original watches the original: hooks are not copied.
        for module in model.modules():
            memo |= {id(hooks): OrderedDict() for hooks in (module._forward_hooks, module._forward_pre_hooks)}
        model = copy.deepcopy(model, memo)
    for block, neurons, groups, stays in zip(blocks_of(model), masks.ffn, masks.attention, masks.blocks, strict=True):
        if stays:
            _slice_block(block, neurons, groups)
    if not all(masks.blocks):
        _drop_blocks(model, masks.blocks)
    return model


def _drop_blocks(model: PreTrainedModel, stays: list[bool]) -> None:
    decoder, config = model.get_decoder(), model.config
    left = [layer for layer, keep in zip(decoder.layers, stays, strict=True) if keep]
    decoder.layers = nn.ModuleList(left)
    for index, layer in enumerate(left):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # where the KV cache keeps a layer's states
                module.layer_idx = index
    table = config.to_dict().get("per_layer_config")  # plain here, whatever transformers makes of the attribute
    kept = [index for index, keep in enumerate(stays) if keep]
    config.num_hidden_layers = len(left)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    if table:  # pruned before: each layer's own values move along
        values = {int(index): value for index, value in table.items()}
        config.per_layer_config = {str(new): values[old] for new, old in enumerate(kept) if old in values}


def check_masks(model: PreTrainedModel, masks: Masks) -> None:
    """Raise ValueError unless the masks are bool, fit the present widths, and keep units of both kinds or of none."""
    blocks = blocks_of(model)
    for kind, given, sizes in (
        ("ffn", masks.ffn, [block.neurons for block in blocks]),
        ("attention", masks.attention, [block.kv_groups for block in blocks]),
    ):
        if len(given) != len(blocks):
            raise ValueError(f"masks.{kind}: expected {len(blocks)} blocks, got {len(given)}.")
        for index, (mask, size) in enumerate(zip(given, sizes, strict=True)):
            if mask.dtype != torch.bool or tuple(mask.shape) != (size,):
                got = f"{mask.dtype} of shape {tuple(mask.shape)}"
                raise ValueError(f"masks.{kind}[{index}]: expected torch.bool of shape ({size},), got {got}.")
            if not mask.any() and masks.blocks[index]:
                raise ValueError(f"masks.{kind}[{index}]: expected at least 1 of {size} units kept, got 0.")
    if not any(masks.blocks):
        raise ValueError(f"masks: expected at least 1 of {len(blocks)} blocks kept, got 0.")


def widths(model: PreTrainedModel) -> dict[str, list[int]]:
    """`{"neurons": [...], "kv_groups": [...]}`, one entry per block, read off the weights."""
    blocks = blocks_of(model)
    return {"neurons": [b.neurons for b in blocks], "kv_groups": [b.kv_groups for b in blocks]}


def count_parameters(model: PreTrainedModel, scope: str) -> int:
    """Parameters (weights and biases) in a scope.

    Args:
        model: model of a supported family.
        scope: `ffn` (gate, up, down), `attention+ffn` (also query, key, value, output) or `all` (the whole
            model, tied embeddings once).

    Raises:
        UserError: unknown scope.
    """
    if scope not in COUNT_SCOPES:
        raise UserError(f"Unknown scope '{scope}'. Available: {', '.join(COUNT_SCOPES)}.")
    if scope == "all":
        return sum(parameter.numel() for parameter in model.parameters())
    modules = []
    for block in blocks_of(model):
        modules += [block.gate, block.up, block.down]
        if scope == "attention+ffn":
            modules += [block.query, block.key, block.value, block.output]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def removed_parameters(model: PreTrainedModel, masks: Masks) -> int:
    """Parameters that `prune` takes out of `model`: units where a block stays, and whole blocks, norms included."""
    return sum(
        int((~neurons).sum()) * block.neuron_cost + int((~groups).sum()) * block.group_cost if stays else block.cost
        for block, neurons, groups, stays in zip(
            blocks_of(model), masks.ffn, masks.attention, masks.blocks, strict=True
        )
    )


def _sliced_parameters(block: Block) -> list[nn.Parameter]:
    """What `_slice_block` replaces: all weights, and the biases where rows go."""
    by_rows = (block.gate, block.up, block.query, block.key, block.value)
    return [*(p for linear in by_rows for p in linear.parameters()), block.down.weight, block.output.weight]


def _slice_block(block: Block, neurons: Tensor, groups: Tensor) -> None:
    # Query channels (rows of q, columns of o) and key/value channels lie group by group.
    query = groups.repeat_interleave(block.channels_per_group)
    key = groups.repeat_interleave(block.head_dim)
    _slice_rows(block.gate, neurons)
    _slice_rows(block.up, neurons)
    _slice_columns(block.down, neurons)
    _slice_rows(block.query, query)
    _slice_rows(block.key, key)
    _slice_rows(block.value, key)
    _slice_columns(block.output, query)


def _slice_rows(linear: nn.Linear, keep: Tensor) -> None:
    linear.weight = _take(linear.weight, 0, keep)
    if linear.bias is not None:
        linear.bias = _take(linear.bias, 0, keep)
    linear.out_features = linear.weight.shape[0]


def _slice_columns(linear: nn.Linear, keep: Tensor) -> None:
    linear.weight = _take(linear.weight, 1, keep)
    linear.in_features = linear.weight.shape[1]


def _take(parameter: nn.Parameter, dim: int, keep: Tensor) -> nn.Parameter:
    """A new contiguous parameter; `index_select` copies even when everything is kept."""
    index = keep.nonzero().squeeze(1).to(parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)
